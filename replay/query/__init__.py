"""The language of questions: nodes, expressions, and the states that reductions run on."""

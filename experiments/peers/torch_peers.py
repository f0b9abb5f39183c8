"""The peers of bench_per_sample.py that need PyTorch, in a process of their own.

Command:  python torch_peers.py '{"model": "mlp", "batch": "batch.npz", ...}'
          prints one line of JSON: seconds of each cell and of a training step just before, by round

Each peer does what its documentation calls fastest: torch.func a `vmap(grad)` of the functional
call; Opacus its hooks (`GradSampleModule`) where gradients are wanted and ghost norms
(`GradSampleModuleFastGradientClipping`) where norms are; BackPACK `BatchL2Grad`, `SumGradSquared`
and `BatchGrad`. The training step is eager, with the fused Adam. What a peer cannot do is noted.
"""

# The peers hang their results on torch's parameters, of whose class they are no part; and this file
# is read where they are not installed, too.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import func, nn
from torch.nn import functional

Cells = dict[tuple[str, str], Callable[[], Any]]


class Block(nn.Module):
    """One layer of a transformer that may look back only, of layers that all peers know."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        y = self.norms[0](x)
        heads = [
            layer(y).unflatten(-1, (4, -1)).transpose(-2, -3)
            for layer in (self.query, self.key, self.value)
        ]
        found = functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(found.transpose(-2, -3).flatten(-2))
        return x + self.narrow(functional.gelu(self.wide(self.norms[1](x)), approximate="tanh"))


class Transformer(nn.Module):
    """Predicts the next of 128 characters."""

    def __init__(self, widths: list[int], time: int):
        super().__init__()
        self.letters = nn.Embedding(128, widths[0])
        self.places = nn.Embedding(time, widths[0])
        self.blocks = nn.ModuleList(Block(width) for width in widths)
        self.norm, self.head = nn.LayerNorm(widths[0]), nn.Linear(widths[0], 128)

    def forward(self, text):
        places = torch.arange(text.shape[-1]).expand(text.shape).contiguous()
        x = self.letters(text) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Lstm(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int, layer: type):
        super().__init__()
        self.lstm, self.head = layer(28, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, image):
        return self.head(self.lstm(image)[0][:, -1])


def network(options: dict[str, Any], time: int, lstm: type = nn.LSTM) -> nn.Module:
    """Return the network of bench_per_sample.py; of one seed, it has the same weights."""
    kind, widths = options["model"], options["widths"]
    torch.manual_seed(0)
    if kind == "transformer":
        return Transformer(widths, time)
    if kind == "lstm":
        model = Lstm(widths[0], lstm)
        for _, value in sorted(model.named_parameters()):
            nn.init.uniform_(value, -0.1, 0.1)
        return model
    layers: list[nn.Module] = []
    if kind == "cnn":
        for inside, outside in zip([1, *widths], widths, strict=False):
            layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(49 * widths[-1], 10))
    for inside, outside in zip([784, *widths], widths, strict=False):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(widths[-1], 10))


def losses(logits, labels):
    """Return the loss of each sample, the mean over its characters where there are several."""
    if labels.ndim == 1:
        return functional.cross_entropy(logits, labels, reduction="none")
    found = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return found.unflatten(0, labels.shape).mean(1)


def norms(grads):
    """Return the norm of each sample's gradient from gradients `[batch, *shape]`."""
    return torch.stack([x.flatten(1).square().sum(1) for x in grads]).sum(0).sqrt()


def clipped(grads):
    """Return the sum of gradients clipped to norm 1."""
    scales = (1 / norms(grads)).clamp(max=1)
    # As one product of matrices: what Opacus does, `einsum("i,i...")`, took far longer on a CPU.
    return [(scales @ x.flatten(1)).view(x.shape[1:]) for x in grads]


REDUCTIONS: dict[str, Callable[[list], Any]] = {
    "norms": norms,
    "square_sum": lambda grads: [x.square().sum(0) for x in grads],
    "abs_sum": lambda grads: [x.abs().sum(0) for x in grads],
    "max": lambda grads: [x.abs().amax(0) for x in grads],
    "clipped sum": clipped,
}


def training(model: nn.Module, x, y, rate: float) -> Callable[[], Any]:
    """Return a training step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)

    def step():
        optimizer.zero_grad()
        losses(model(x), y).mean().backward()
        optimizer.step()

    return step


def by_torch_func(model: nn.Module, x, y) -> Cells:
    """Return `vmap(grad)`, and reductions of what it gives."""
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params, x, y):
        return losses(func.functional_call(model, params, (x[None],)), y[None])[0]

    each = func.vmap(func.grad(loss), (None, 0, 0))

    def cell(reduce):
        return lambda: reduce(list(each(params, x, y).values()))

    return {(name, "torch.func"): cell(reduce) for name, reduce in REDUCTIONS.items()}


def by_opacus(model: nn.Module, x, y) -> Cells:
    """Return gradients by hooks, and reductions of them; norms and clipped sums by ghost norms."""
    from opacus.grad_sample import (
        GradSampleModule,
        GradSampleModuleFastGradientClipping,
    )

    hooked = GradSampleModule(copy.deepcopy(model))
    ghost = GradSampleModuleFastGradientClipping(copy.deepcopy(model), max_grad_norm=1)

    def backward(module):
        module.zero_grad(set_to_none=True)
        found = losses(module(x), y)
        found.mean().backward(retain_graph=module is ghost)
        return found

    def cell(reduce):
        def call():
            backward(hooked)
            return reduce([p.grad_sample for p in hooked.parameters()])

        return call

    def ghost_norms():
        backward(ghost)
        return ghost.get_norm_sample()

    def ghost_clipped():
        found = backward(ghost)
        scales = ghost.get_clipping_coef()
        ghost.zero_grad(set_to_none=True)
        ghost.disable_hooks()
        (found * scales).sum().backward()
        ghost.enable_hooks()
        return [p.grad for p in ghost.parameters()]

    cells: Cells = {(name, "Opacus hooks"): cell(reduce) for name, reduce in REDUCTIONS.items()}
    ghosts = {"norms": ghost_norms, "clipped sum": ghost_clipped}
    return cells | {(name, "Opacus ghost"): call for name, call in ghosts.items()}


def by_backpack(model: nn.Module, x, y) -> Cells:
    """Return what its extensions give."""
    from backpack import backpack, extend, extensions
    from backpack.custom_module import reduce_tuple, slicing

    if isinstance(model, Lstm):
        last = slicing.Slicing((slice(None), -1))
        model = nn.Sequential(model.lstm, reduce_tuple.ReduceTuple(0), last, model.head)
    if not isinstance(model, nn.Sequential):
        raise NotImplementedError("it extends chains of its own list of layers")
    model, size = extend(copy.deepcopy(model)), len(x)
    loss = extend(nn.CrossEntropyLoss())

    def run(extension):
        model.zero_grad(set_to_none=True)
        with backpack(extension()):
            loss(model(x), y).backward()
        return model.parameters()

    def from_l2():
        found = run(extensions.BatchL2Grad)
        return size * torch.stack([p.batch_l2 for p in found]).sum(0).sqrt()

    def squares():
        return [size**2 * p.sum_grad_squared for p in run(extensions.SumGradSquared)]

    def cell(reduce):
        return lambda: reduce([size * p.grad_batch for p in run(extensions.BatchGrad)])

    cells: Cells = {
        (name, "BackPACK batch_grad"): cell(reduce) for name, reduce in REDUCTIONS.items()
    }
    return cells | {
        ("norms", "BackPACK batch_l2"): from_l2,
        ("square_sum", "BackPACK sum_grad_squared"): squares,
    }


def clock(function: Callable[[], Any], repeats: int = 1) -> float:
    """Return the seconds of one call."""
    begun = time.perf_counter()
    for _ in range(repeats):
        function()
    return (time.perf_counter() - begun) / repeats


def alternate(step: Callable[[], Any], cells: Cells, options: dict[str, Any]) -> list[dict]:
    """Time steps and cells in turn, as bench_per_sample.py does."""
    block, (few, many) = options["block_s"], options["rounds"]
    step_s = min(clock(step) for _ in range(3))
    plans = {}
    for name, cell in cells.items():
        clock(cell)
        seconds = clock(cell)
        rounds = options["budget_s"] / (max(seconds, block) + max(step_s, block))
        plans[name] = max(1, round(block / seconds)), int(np.clip(rounds, few, many))
    found: dict[Any, list] = {name: [] for name in cells}
    for turn in range(many):
        for name, cell in cells.items():
            repeats, rounds = plans[name]
            if turn < rounds:
                pair = clock(step, max(1, round(block / step_s))), clock(cell, repeats)
                found[name].append(pair)
    return [
        {"reduction": name, "peer": peer, "steps": steps, "seconds": seconds}
        for (name, peer), pairs in found.items()
        for steps, seconds in [list(zip(*pairs, strict=True))]
    ]


def check(cells: Cells) -> None:
    """Make sure that all peers find the same gradients, so that the same work is compared."""
    for name in REDUCTIONS:
        same = [call() for (reduction, _), call in cells.items() if reduction == name]
        flat = [
            # Sorted, since not all name their tensors in one order.
            torch.cat([x.flatten() for x in (y if isinstance(y, list) else [y])]).sort().values
            for y in same
        ]
        for one in flat[1:]:
            scale = flat[0].abs().max()
            assert (one - flat[0]).abs().max() <= 1e-3 * scale, name


def main() -> None:
    """Measure all peers on one network."""
    warnings.simplefilter("ignore")
    options = json.loads(sys.argv[1])
    with np.load(options["batch"]) as arrays:
        x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]).long()
    x = x[:, None] if options["model"] == "cnn" else x
    x = x.long() if options["model"] == "transformer" else x
    cells: Cells = {}
    notes = []
    for peer in (by_torch_func, by_opacus, by_backpack):
        lstm: type = nn.LSTM
        if options["model"] == "lstm" and peer is not by_backpack:
            # Opacus refuses torch's own, and `vmap` goes through this one too.
            from opacus.layers import DPLSTM

            lstm = DPLSTM
        try:
            found = peer(network(options, x.shape[1], lstm), x, y)
            for call in found.values():
                call()
            cells |= found
        except Exception as error:
            notes.append(f"{peer.__name__}: {type(error).__name__}: {str(error)[:300]}")
    check(cells)
    step = training(network(options, x.shape[1]), x, y, options["learning_rate"])
    print(json.dumps({"notes": notes, "cells": alternate(step, cells, options)}))


if __name__ == "__main__":
    main()

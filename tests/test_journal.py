import pytest
from hypothesis import given
from hypothesis import strategies as st

from replay.errors import LogError
from replay.journal import Durable, frame, frames, only_frame

DIGEST = b"0123456789ab"
STEPS = {"kind": "steps", "end": 8, "digest": DIGEST, "metrics": [[4, {"accuracy": 0.5}]]}
CHECKPOINT = {"kind": "checkpoint", "state": 8, "row": 1, "digest": b"x" * 16}


def read(*records):
    return Durable.read(b"".join(map(frame, records)), "journal")


def test_a_journal_adds_up():
    durable = read(STEPS, CHECKPOINT, {"kind": "selftest", "differs": ""}, {"kind": "closed"})
    assert (durable.steps, durable.checkpoints, durable.rows) == (8, {8: 1}, 2)
    assert durable.digests == {8: b"x" * 16}
    assert durable.metrics == [(4, {"accuracy": 0.5})]
    assert (durable.closed, durable.selftest) == (True, "")


def test_resuming_forgets_metrics_that_will_be_logged_again_and_reopens_the_run():
    durable = read(STEPS, CHECKPOINT, {"kind": "closed"}, {"kind": "resumed", "state": 0})
    assert durable.metrics == []
    assert durable.steps == 8
    assert not durable.closed


def test_dropped_checkpoints_are_gone_but_their_digests_remain_evidence():
    durable = read(STEPS, CHECKPOINT, {"kind": "dropped", "states": [8]})
    assert durable.checkpoints == {}
    assert 8 in durable.digests


def test_a_torn_tail_is_cut_off_at_every_byte():
    whole = frame(STEPS)
    tail = frame(CHECKPOINT)
    for cut in range(len(tail)):
        durable = Durable.read(whole + tail[:cut], "journal")
        assert (durable.end, durable.checkpoints) == (len(whole), {})


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_is_damage_or_cuts_the_last_frame(place, bit):
    records = [frame(STEPS), frame(CHECKPOINT), frame({"kind": "closed"})]
    data = bytearray(b"".join(records))
    place %= len(data)
    data[place] ^= 1 << bit
    last = len(records[0]) + len(records[1])
    if place < last:
        with pytest.raises(LogError, match="damaged at byte"):
            list(frames(bytes(data), "journal"))
    else:
        assert [end for end, _ in frames(bytes(data), "journal")] == [len(records[0]), last]


@pytest.mark.parametrize(
    "record",
    [
        {"kind": "surprise"},
        {"kind": "steps", "end": -1, "digest": DIGEST, "metrics": []},
        {"kind": "steps", "end": 2**60, "digest": DIGEST, "metrics": []},
        {"kind": "checkpoint", "state": 0, "row": "0", "digest": DIGEST},
        {"kind": "checkpoint", "state": 0, "row": 0, "digest": "text"},
        {"kind": "dropped", "states": [5]},
        [],
        7,
    ],
    ids=str,
)
def test_a_record_that_no_recorder_writes_is_refused(record):
    with pytest.raises(LogError, match="no recorder writes"):
        read(STEPS, record)


def test_a_file_of_one_frame_is_all_or_nothing():
    data = frame({"a": 1})
    assert only_frame(data, "run.msgpack") == {"a": 1}
    for broken in (b"", data[:-1], data + b"\0", data[:20] + b"?" + data[21:]):
        with pytest.raises(LogError, match="run.msgpack is damaged"):
            only_frame(broken, "run.msgpack")


def test_a_declared_length_takes_no_memory():
    huge = b"RPLY" + (2**32 - 1).to_bytes(4, "little") + b"\0" * 4
    assert list(frames(huge, "journal")) == []

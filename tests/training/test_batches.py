"""Where batches come from: order, position, resume."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.training.checksums import checksums
from mole_kernels.training.data import BatchStream, TensorBatches, counted_generator


def batches(n=10, batch_size=3, **options):
    return TensorBatches({"latents": torch.arange(n), "text": torch.arange(n) * 10}, batch_size, **options)


def draws(stream, count):
    return [stream.draw() for _ in range(count)]


def test_an_epoch_holds_every_sample_at_most_once_and_epochs_differ():
    stream = iter(batches())
    epochs = [torch.cat([next(stream)["latents"] for _ in range(3)]) for _ in range(4)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    batch = next(stream)
    assert torch.equal(batch["text"], batch["latents"] * 10)
    assert next(iter(batches(shuffle=False)))["latents"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("taken", [0, 2, 3, 7])
@pytest.mark.parametrize("kind", ["stateful", "list", "loader"])
def test_a_restored_stream_goes_on_with_the_very_next_batch(kind, taken):
    def source():
        if kind == "list":
            return [{"latents": torch.tensor([i])} for i in range(4)]
        if kind == "loader":
            return torch.utils.data.DataLoader([{"latents": torch.tensor(i)} for i in range(8)], batch_size=2)
        return batches()

    whole = draws(BatchStream(source()), 10)
    first = BatchStream(source())
    draws(first, taken)
    second = BatchStream(source())
    second.restore(first.state())
    for (number, batch), (wanted, right) in zip(draws(second, 10 - taken), whole[taken:]):
        assert number == wanted and torch.equal(batch["latents"], right["latents"])


def test_processes_share_the_batches_out():
    whole = draws(BatchStream(batches()), 6)
    for process in range(2):
        for (number, batch), (wanted, right) in zip(
            draws(BatchStream(batches(), process, 2), 3), whole[process::2]
        ):
            assert number == wanted and torch.equal(batch["latents"], right["latents"])


def test_other_data_on_resume_is_refused():
    def counted(width):
        return [{"latents": torch.zeros(2, width)}] * 3

    stream = BatchStream(batches())
    stream.draw()
    for other, what in (
        (batches(n=11), "samples"),
        (batches(batch_size=2), "batch_size"),
        (batches(seed=1), "seed"),
    ):
        with pytest.raises(MoleStateError, match=what):
            BatchStream(other).restore(stream.state())
    with pytest.raises(MoleStateError, match="counted"):
        BatchStream(counted(4)).restore(stream.state())
    with pytest.raises(MoleStateError, match="expected 1 processes as before, got 2"):
        BatchStream(batches(), 0, 2).restore(stream.state())
    listed = BatchStream(counted(4))
    listed.draw()
    with pytest.raises(MoleStateError, match=r"expected .*4.*got .*5"):
        BatchStream(counted(5)).restore(listed.state())
    wider = TensorBatches({"latents": torch.zeros(10, 2), "text": torch.zeros(10)}, 3)
    with pytest.raises(MoleStateError, match=r"shapes: expected .* as when the run began, got .*2"):
        BatchStream(wider).restore(stream.state())


class Numbered:
    """A source that is asked for batches by number, without a state of its own."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def batch(self, number):
        return self.rows[number % len(self.rows)]


def rows_of(words):
    """Batches with latents, text states of the captions, and the captions themselves."""
    return [
        {
            "latents": torch.full((2, 3), float(i)),
            "states": torch.tensor([[float(len(w)), float(sum(map(ord, w)))] for w in pair]),
            "captions": list(pair),
        }
        for i, pair in enumerate(words)
    ]


def stacked(words, sources=None):
    rows = rows_of(words)
    tensors = {key: torch.cat([row[key] for row in rows]) for key in ("latents", "states")}
    return TensorBatches(tensors, 2, sources=sources)


SOURCES = {
    "list": rows_of,
    "loader": lambda words: torch.utils.data.DataLoader(rows_of(words), batch_size=None),
    "generator": lambda words: (row for row in rows_of(words)),
    "numbered": lambda words: Numbered(rows_of(words)),
    "tensors": stacked,
}
CAPTIONS = [("a cat", "a dog"), ("a red cup", "two owls"), ("a hat", "the sea")]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(SOURCES)),
    drawn=st.integers(1, 3),
    row=st.integers(0, 2),
    place=st.integers(0, 1),
    word=st.text("abc\u2028", min_size=1, max_size=4),
)
def test_other_captions_on_resume_are_refused_and_named(kind, drawn, row, place, word):
    stream = BatchStream(SOURCES[kind](CAPTIONS))
    draws(stream, drawn)
    state = stream.state()
    BatchStream(SOURCES[kind](CAPTIONS)).restore(state)
    changed = [list(pair) for pair in CAPTIONS]
    changed[row][place] += word
    # what a run has not seen yet is known to a source that holds all of its data at once
    seen = kind == "tensors" or (row == 0 if kind == "numbered" else row < drawn)
    if not seen:
        BatchStream(SOURCES[kind](changed)).restore(state)
        return
    with pytest.raises(MoleStateError, match=r"resume: batches, (captions|states): has other values"):
        BatchStream(SOURCES[kind](changed)).restore(state)


def test_a_tensor_with_a_source_is_known_by_it():
    state = BatchStream(stacked(CAPTIONS, {"latents": "vae 1"})).state()
    again = stacked(CAPTIONS, {"latents": "vae 1"})
    # as another device computes it
    again.tensors["latents"] += 1e-6
    BatchStream(again).restore(state)
    with pytest.raises(MoleStateError, match="batches, latents"):
        BatchStream(stacked(CAPTIONS, {"latents": "vae 2"})).restore(state)


def test_checksums_know_kinds_and_order():
    values = [torch.tensor([1, 2]), torch.tensor([2, 1]), torch.tensor(True), "ab", b"ab", ["a", "b"], ["ab"]]
    values += [{"a": "b"}, {"b": "a"}, None, 0, 0.0, (), torch.tensor([1.0, 2.0], dtype=torch.bfloat16)]
    sums = [checksums({"x": value})["x"] for value in values]
    assert len(set(sums)) == len(values)
    once = checksums({"x": values[0]})
    assert checksums({"x": values[1]}, once) != checksums({"x": values[0]}, checksums({"x": values[1]}))


def test_sources_that_cannot_be():
    with pytest.raises(MoleTypeError, match="iterable of dicts"):
        BatchStream({"latents": torch.zeros(3)})
    with pytest.raises(MoleTypeError, match="dicts of tensors"):
        BatchStream([torch.zeros(3)]).draw()
    with pytest.raises(MoleStateError, match="after 0 batches"):
        BatchStream([]).draw()
    once = BatchStream({"latents": torch.zeros(1)} for _ in range(2))
    draws(once, 2)
    with pytest.raises(MoleStateError, match="after 2 batches"):
        once.draw()
    with pytest.raises(MoleValueError, match="batch_size"):
        batches(n=2)
    with pytest.raises(MoleShapeError, match="first dimension"):
        TensorBatches({"a": torch.zeros(2), "b": torch.zeros(3)}, 1)


def test_counted_generators_differ_by_every_part_of_their_path():
    first = [
        torch.randn(4, generator=counted_generator(*path)).tolist()
        for path in ((0, 1), (0, 2), (1, 1), (0, "a", 1), (0, 1))
    ]
    assert first[0] == first[4] and len({tuple(x) for x in first}) == 4

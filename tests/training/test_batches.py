"""Where batches come from: order, position, resume."""

import pytest
import torch

from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
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
    resumed = BatchStream(wider)
    resumed.restore(stream.state())
    with pytest.raises(MoleStateError, match="as when the run began"):
        resumed.draw()


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

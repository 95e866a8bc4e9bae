"""The scenes are what their captions say, the same each time, and no held-out scan is trained on."""

import pytest
import torch
from torch import Generator

from mole_kernels.demo import data

pytest.importorskip("sklearn")


def scenes(seed: int, **kwargs) -> data.Pictures:
    return data.scenes(data.load_split("train"), 64, Generator().manual_seed(seed), **kwargs)


def test_the_splits_share_no_scan():
    train, held = data.load_split("train"), data.load_split("held")
    assert len(train.index) == data.TRAIN_SAMPLES and len(train.index) + len(held.index) == 1797
    assert set(train.index.tolist()).isdisjoint(held.index.tolist())
    assert set(held.labels.tolist()) == set(range(10))


def test_no_held_out_scan_has_a_twin_in_training():
    train, held = data.load_split("train"), data.load_split("held")
    distance = torch.cdist(held.images.flatten(1), train.images.flatten(1))
    assert distance.min() > 0.1


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'train' or 'held'"):
        data.load_split("test")


def test_one_seed_gives_one_set_of_scenes():
    one, same, other = (
        scenes(1, weak=0.5, mislabel=0.3),
        scenes(1, weak=0.5, mislabel=0.3),
        scenes(2, weak=0.5, mislabel=0.3),
    )
    assert (
        torch.equal(one.pixels, same.pixels)
        and one.captions == same.captions
        and torch.equal(one.boxes, same.boxes)
    )
    assert not torch.equal(one.pixels, other.pixels) and one.captions != other.captions


def test_captions_name_the_labels():
    made = scenes(3)
    assert made.labels.tolist() == [data.labels_of(caption) for caption in made.captions]
    assert data.caption_of([3, -1, 7]) == "three blank seven"
    assert set((made.labels >= 0).sum(1).tolist()) == {0, 1, 2, 3}


def test_boxes_lie_in_the_slots_of_their_half():
    made = scenes(4)
    for slot in range(data.SLOTS):
        boxes = made.boxes[..., slot * data.SLOT : (slot + 1) * data.SLOT].amax((2, 3))
        label = made.labels[:, slot]
        assert torch.equal(boxes[:, 0] > 0, (label >= 0) & (label < 5))
        assert torch.equal(boxes[:, 1] > 0, label >= 5)


def test_pixels_are_pictures():
    made = scenes(5)
    assert made.pixels.shape == (64, 3, data.HEIGHT, data.WIDTH)
    assert made.pixels.min() >= -1 and made.pixels.max() <= 1


def test_low_cards_are_dark_and_high_cards_light():
    made = scenes(6)
    grey = made.pixels.mean(1, keepdim=True)
    low, high = ((grey * box).sum() / box.sum() for box in (made.boxes[:, :1], made.boxes[:, 1:]))
    assert low < -0.1 < 0.1 < high


def test_out_of_focus_scans_lose_detail_and_keep_most_of_their_ink():
    scans = data.load_split("train").images[:200]
    weak = data.out_of_focus(scans)
    assert weak.var((1, 2)).mean() < 0.6 * scans.var((1, 2)).mean()
    # cells at the edge are averaged with the empty paper beyond it
    assert 0.85 * scans.mean() < weak.mean() < scans.mean()


def test_mislabelled_digits_stay_in_their_half():
    sharp, wrong = scenes(7), scenes(7, mislabel=1.0)
    assert sharp.captions == wrong.captions
    assert torch.equal(sharp.boxes.amax((2, 3)), wrong.boxes.amax((2, 3)))
    assert not torch.equal(sharp.pixels, wrong.pixels)


@pytest.mark.parametrize("half", [0, 1], ids=data.HALVES)
def test_closeups_show_one_digit_of_their_half(half):
    made = data.closeups(data.load_split("train"), 40, Generator().manual_seed(0), half)
    assert made.pixels.shape == (40, 3, data.SLOT, data.SLOT)
    assert (made.labels >= 0).sum(1).tolist() == [1] * 40
    assert set(made.labels.amax(1).tolist()) == set(range(5 * half, 5 * half + 5))
    assert made.captions == [data.caption_of(row) for row in made.labels.tolist()]
    area = made.boxes[:, half].sum((1, 2))
    assert (
        bool((area >= 16**2).all())
        and bool((area <= 20**2).all())
        and not bool(made.boxes[:, 1 - half].any())
    )

"""Query pools: what they are made of, in which numbers, and how images are converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.data.dataset import DataConfig, Dataset, Images, load
from simulator.data.patches import patches
from simulator.data.pool import Pool, PoolSpec, build_pool, convert_images, without_test_images
from simulator.errors import InputError


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(DataConfig(name="digits", size=8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def colour_images(count: int = 40, side: int = 20, classes: int = 4) -> Images:
    pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator(9))
    return Images(pixels, torch.arange(count) % classes)


def build(value: object, dataset: Dataset, count: int = 100, seed: int = 0, triggers: Images | None = None) -> Pool:
    return build_pool(
        PoolSpec.parse(value),
        dataset=dataset,
        count=count,
        generator=generator(seed),
        foreign=lambda _: colour_images(),
        triggers=triggers,
    )


def rows(images: torch.Tensor) -> list[bytes]:
    return [row.tobytes() for row in images.numpy()]


class TestSpec:
    @pytest.mark.parametrize(
        ("value", "label"),
        [
            ("patches", "patches"),
            ({"patches": 1, "attacker": 1}, "attacker+patches"),
            ({"attacker": 3, "patches": 1.5}, "2*attacker+patches"),
            ({"parts": "attacker", "classes": [3, 1]}, "attacker[1,3]"),
            ({"parts": {"patches": 2}, "size": 500}, "patches@500"),
            ("some/where/tiny.npz", "tiny.npz"),
        ],
    )
    def test_forms_and_labels(self, value: object, label: str) -> None:
        spec = PoolSpec.parse(value)
        assert spec.label == label
        again = PoolSpec.parse(spec.model_dump(mode="json"))
        assert again == spec
        assert hash(again) == hash(spec)
        assert PoolSpec.parse(spec) is spec

    @pytest.mark.parametrize(
        ("value", "part"),
        [
            ("atacker", "did you mean 'attacker'?"),
            ({"attacker": 1, "size": 5}, "'size' is not one of"),
            ({"attacker": 0}, "weight of 'attacker' is 0.0"),
            ({"attacker": -1.0}, "weight of 'attacker' is -1.0"),
            ({"attacker": float("inf")}, "finite"),
            ({"attacker": "much"}, "found 'much'"),
            ({}, "at least one part"),
            (None, "neither a name nor a mapping"),
            (["attacker"], "neither a name nor a mapping"),
            ({"parts": "attacker", "number": 3}, "number: no such setting"),
            ({"parts": "attacker", "size": 0}, "size"),
            ({"parts": "attacker", "classes": []}, "at least one class"),
            ({"parts": "attacker", "classes": ["cat"]}, "classes"),
            ({"parts": "patches", "classes": [1]}, "restrict the parts attacker and owner"),
        ],
    )
    def test_refused(self, value: object, part: str) -> None:
        with pytest.raises(InputError) as caught:
            PoolSpec.parse(value)
        line = str(caught.value)
        assert part in line
        assert line.startswith("pool: ")
        assert "\n" not in line


class TestBuild:
    def test_attacker_has_all_its_images_and_none_of_the_others(self, digits: Dataset) -> None:
        pool = build("attacker", digits, count=10)
        # the 1797 digits are all different, so their bytes tell them apart
        assert sorted(rows(pool.images)) == sorted(rows(digits.attacker.images))
        assert not set(rows(pool.images)) & {*rows(digits.owner.images), *rows(digits.test.images)}
        assert pool.groups.bincount().tolist() == digits.attacker.labels.bincount().tolist()

    def test_owner(self, digits: Dataset) -> None:
        assert sorted(rows(build("owner", digits).images)) == sorted(rows(digits.owner.images))

    def test_size_takes_a_random_part(self, digits: Dataset) -> None:
        first, second = (build({"parts": "attacker", "size": 50}, digits, seed=seed) for seed in (0, 1))
        assert len(first) == len(set(rows(first.images))) == 50
        assert set(rows(first.images)) != set(rows(second.images))

    def test_classes(self, digits: Dataset) -> None:
        pool = build({"parts": "attacker", "classes": [2, 7]}, digits)
        assert sorted(rows(pool.images)) == sorted(rows(digits.attacker.subset_of_classes([2, 7]).images))
        assert pool.groups.unique().tolist() == [0, 1]

    def test_a_generated_pool_has_as_many_images_as_the_budget(self, digits: Dataset) -> None:
        assert len(build("patches", digits, count=37)) == 37
        assert len(build({"parts": "patches", "size": 21}, digits, count=37)) == 21

    @settings(max_examples=30)
    @given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(20, 400))
    def test_mixture_counts(self, digits: Dataset, attacker: float, patch: float, count: int) -> None:
        pool = build({"attacker": attacker, "patches": patch}, digits, count=count)
        taken = len(set(rows(digits.attacker.images)) & set(rows(pool.images)))
        assert taken == round(count * attacker / (attacker + patch))
        assert len(pool) - taken == round(count * patch / (attacker + patch))

    def test_the_scarcest_part_bounds_a_mixture(self, digits: Dataset) -> None:
        pool = build({"owner": 1, "attacker": 3, "patches": 2}, digits, count=10_000)
        assert len(pool) == 1000  # 500 of the attacker's are three sixths of it
        assert len(set(rows(pool.images)) & set(rows(digits.attacker.images))) == 500
        assert len(set(rows(pool.images)) & set(rows(digits.owner.images))) == 167

    def test_sources_do_not_share_groups(self, digits: Dataset) -> None:
        pool = build({"attacker": 1, "other/set.npz": 1}, digits)
        own = torch.tensor([row in set(rows(digits.attacker.images)) for row in rows(pool.images)])
        assert own.sum() == 40
        assert pool.groups.unique().tolist() == list(range(14))
        assert int(pool.groups[own].max()) < int(pool.groups[~own].min())

    def test_sources_are_the_parents_of_their_groups(self, digits: Dataset) -> None:
        pool = build({"attacker": 1, "other/set.npz": 1}, digits)
        assert pool.parents is not None
        assert pool.parents.tolist() == [0] * 10 + [1] * 4
        own = torch.tensor([row in set(rows(digits.attacker.images)) for row in rows(pool.images)])
        assert torch.equal(pool.parents[pool.groups] == 0, own)

    @pytest.mark.parametrize("value", ["attacker", "patches", {"attacker": 1000, "patches": 1}])
    def test_one_source_has_no_level_above_it(self, value: object, digits: Dataset) -> None:
        assert build(value, digits).parents is None

    def test_foreign_images_are_converted(self, digits: Dataset) -> None:
        pool = build("other/set.npz", digits)
        assert pool.images.shape == (40, 1, 8, 8)
        assert sorted(rows(pool.images)) == sorted(rows(convert_images(colour_images().images, 1, 8)))

    def test_triggers(self, digits: Dataset) -> None:
        triggers = Images(digits.owner.images[:6], torch.tensor([0, 0, 0, 1, 1, 1]))
        assert len(build({"attacker": 1, "triggers": 1}, digits, triggers=triggers)) == 12

    def test_test_images_under_another_name_are_left_out(self, digits: Dataset) -> None:
        mixed = Images(torch.cat([digits.test.images[:30], digits.owner.images[:5]]), torch.arange(35))
        clean = without_test_images(mixed, digits, "copy.npz")
        assert rows(clean.images) == rows(digits.owner.images[:5])
        assert clean.labels.tolist() == [30, 31, 32, 33, 34]

    def test_a_set_of_nothing_but_test_images_is_refused(self, digits: Dataset) -> None:
        with pytest.raises(InputError, match=r"every image of 'copy\.npz' is a test image"):
            without_test_images(digits.test, digits, "copy.npz")

    def test_the_test_images_are_known_in_another_format(self, digits: Dataset) -> None:
        colour = Images(convert_images(digits.test.images[:4], 3, 8), torch.arange(4))
        other = Images(convert_images(digits.owner.images[:1], 3, 8), torch.arange(1))
        both = Images(torch.cat([colour.images, other.images]), torch.cat([colour.labels, other.labels]))
        assert rows(without_test_images(both, digits, "colour").images) == rows(digits.owner.images[:1])

    @pytest.mark.parametrize(
        ("value", "part"),
        [
            ("digits", "the victim's own data set"),
            ("triggers", "no trigger samples"),
            ({"parts": "owner", "classes": [10]}, "class 10 is not one of"),
            ({"parts": {"owner": 1, "attacker": 3}, "size": 1}, None),
            ({"parts": {"owner": 1, "attacker": 1}, "size": 1}, "no image at all"),
        ],
    )
    def test_refused(self, digits: Dataset, value: Any, part: str | None) -> None:
        if part is None:
            assert len(build(value, digits)) == 1
            return
        with pytest.raises(InputError, match=part):
            build(value, digits)

    def test_the_victims_own_file_is_its_own_set(self, digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(Path("/"))
        victim = Dataset("/sets/mine.npz", digits.classes, digits.owner, digits.attacker, digits.test)
        with pytest.raises(InputError, match="own data set"):
            build("./sets/mine.npz", victim)

    @pytest.mark.parametrize("value", ["attacker", "patches", {"attacker": 1, "patches": 2}])
    def test_repeatable_and_shuffled(self, digits: Dataset, value: object) -> None:
        first, again, other = (build(value, digits, seed=seed) for seed in (3, 3, 4))
        assert torch.equal(first.images, again.images)
        assert torch.equal(first.groups, again.groups)
        assert not torch.equal(first.images, other.images)

    def test_order_of_the_parts_does_not_matter(self, digits: Dataset) -> None:
        first = build({"attacker": 1, "patches": 2}, digits)
        assert torch.equal(first.images, build({"patches": 2, "attacker": 1}, digits).images)


class TestConvert:
    @settings(max_examples=40)
    @given(
        st.sampled_from([1, 3]), st.sampled_from([1, 3]), st.integers(8, 64), st.integers(8, 64), st.integers(0, 255)
    )
    def test_a_plain_image_stays_plain(self, before: int, after: int, side: int, size: int, value: int) -> None:
        converted = convert_images(torch.full((2, before, side, side + 3), value, dtype=torch.uint8), after, size)
        assert converted.shape == (2, after, size, size)
        assert converted.dtype == torch.uint8
        assert converted.unique().tolist() == [value]

    def test_luminance(self) -> None:
        colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8).reshape(3, 3, 1, 1)
        grey = convert_images(colours.expand(3, 3, 8, 8), 1, 8)
        assert grey[:, 0, 0, 0].tolist() == [76, 150, 29]

    def test_halving_is_antialiased(self) -> None:
        # one-pixel stripes have no detail left at half the size: only the mean
        stripes = torch.zeros(1, 1, 32, 32, dtype=torch.uint8)
        stripes[..., ::2] = 200
        assert convert_images(stripes, 1, 16)[..., 1:-1].unique().tolist() == [100]

    def test_nothing_to_do(self) -> None:
        images = colour_images().images
        assert convert_images(images, 3, 20) is images
        assert convert_images(images[:0], 1, 8).shape == (0, 1, 8, 8)

    def test_two_channels(self) -> None:
        with pytest.raises(ValueError, match="1 or 3 channels"):
            convert_images(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), 1, 8)


class TestPatches:
    @pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 28), (3, 32), (3, 256), (1, 512)])
    def test_shape_contrast_and_groups(self, channels: int, size: int) -> None:
        crops = patches(60, channels, size, generator())
        assert crops.images.shape == (60, channels, size, size)
        assert crops.images.dtype == torch.uint8
        assert set(crops.labels.tolist()) <= set(range(8))
        lowest, highest = crops.images.flatten(1).amin(dim=1), crops.images.flatten(1).amax(dim=1)
        stretched = (lowest == 0) & (highest == 255)
        flat = highest.int() - lowest.int() < 9
        assert bool((stretched | flat).all())
        assert int(stretched.sum()) > 40

    def test_crops_differ(self) -> None:
        crops = patches(200, 1, 16, generator())
        assert len(set(rows(crops.images))) > 195
        assert len(crops.labels.unique()) == 8

    def test_repeatable(self) -> None:
        first, again, other = (patches(20, 3, 16, generator(seed)) for seed in (0, 0, 1))
        assert torch.equal(first.images, again.images)
        assert not torch.equal(first.images, other.images)

    def test_global_random_state_is_untouched(self) -> None:
        before = torch.get_rng_state()
        patches(20, 3, 16, generator())
        assert torch.equal(before, torch.get_rng_state())

    def test_none(self) -> None:
        assert len(patches(0, 1, 8, generator())) == 0


def test_a_pool_of_one_data_set_shares_its_images_and_takes_in_its_own_order(digits: Dataset) -> None:
    pool = build("attacker", digits)
    assert pool.source.data_ptr() == digits.attacker.images.data_ptr()
    assert not torch.equal(pool.images, digits.attacker.images)
    indices = torch.tensor([5, 0, 5])
    assert torch.equal(pool.take(indices), pool.images[indices])
    plain = Pool("plain", pool.images, pool.groups)
    assert plain.images is plain.source
    assert torch.equal(plain.take(indices), pool.take(indices))

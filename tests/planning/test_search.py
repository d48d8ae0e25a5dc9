"""The search for a batch, or for a change, that fits: where memory is a known function of both."""

import types

import pytest

from configs import txt2img
from latent_diffusion_jax.planning import search
from latent_diffusion_jax.planning.compiled import CompilerError, Memory
from latent_diffusion_jax.planning.links import Slices
from latent_diffusion_jax.runtime.chips import find_chip

AVAILABLE = 1000.0
CHIP = find_chip("TPU v5 lite")
assert CHIP is not None
SLICES = Slices(CHIP, (2, 2), 1)


def attempt_with(bytes_of):
    """`attempt` for a memory of `bytes_of(config, images)`; keeps what was asked."""
    asked = []

    def attempt(config, images):
        asked.append((config, images))
        memory = Memory({"parameters": 0.0}, bytes_of(config, images), AVAILABLE)
        return types.SimpleNamespace(
            memory=memory,
            program=types.SimpleNamespace(images=4 * images),
            slices=types.SimpleNamespace(num_chips=4),
        )

    return attempt, asked


def parts(config):
    """Chips with images of their own, of four."""
    return 4 // config.mesh.tensor


@pytest.mark.parametrize(
    ("fixed", "of_image", "start", "expected"),
    [
        (100.0, 10.0, 8, 90),
        (100.0, 10.1, 8, 89),
        (100.0, 450.0, 1, 2),
        (0.0, 1000.0, 1, 1),
        (0.0, 0.001, 4, search.MOST),
        (3.0, 1.0, 1, 997),
    ],
)
def test_the_largest_batch(fixed, of_image, start, expected):
    attempt, asked = attempt_with(lambda config, images: fixed + of_image * images)
    assert search.largest_batch(None, start, attempt(None, start), attempt) == expected
    assert len(asked) <= 6  # each is a compilation


@pytest.mark.parametrize("start", [1, 2, 3, 8, 20, 33])
@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (lambda images: 200.0 if images < 40 else 30.0 * images, 39),
        (lambda images: 300.0 + 5.0 * images if images < 50 else 550.0 + 23.0 * (images - 50), 69),
        (lambda images: 0.1 * images**2, 100),
        (lambda images: 110.0 * images**0.5, 82),
        (lambda images: 128.0 * -(-images // 8) + images, 56),  # in tiles of eight
    ],
)
def test_the_largest_batch_where_memory_does_not_grow_evenly(memory, expected, start):
    attempt, asked = attempt_with(lambda config, images: memory(images))
    assert search.largest_batch(None, start, attempt(None, start), attempt) == expected
    assert len(asked) <= 14


def test_the_largest_batch_where_the_compiler_gives_up():
    """The error of more than 30 images does not say how much memory would do."""
    attempt, asked = attempt_with(lambda config, images: 10.0 * images)

    def limited(config, images):
        if images > 30:
            asked.append((config, images))
            raise CompilerError("diffusion cannot be compiled for 31 images: no room")
        return attempt(config, images)

    assert search.largest_batch(None, 8, attempt(None, 8), limited) == 30
    assert len(asked) <= 12


def test_the_largest_batch_of_micro_batches():
    attempt, asked = attempt_with(lambda config, images: 100.0 + 10.0 * images)
    assert search.largest_batch(None, 6, attempt(None, 6), attempt, multiple=6) == 90
    assert all(images % 6 == 0 for _, images in asked)


def needs(fsdp=1, remat=("none", "blocks", "full", "offload"), accumulation=1, images=8):
    """Fits with at least so much sharding, one of these policies, so many micro-batches."""

    def bytes_of(config, batch):
        fits = (
            config.mesh.fsdp >= fsdp
            and config.unet.remat in remat
            and config.accumulation >= accumulation
            and batch <= images
        )
        return 500.0 if fits else 2000.0

    return bytes_of


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        (needs(fsdp=4), "--config.mesh.fsdp=4 --config.mesh.tensor=1"),
        (needs(accumulation=4), "--config.accumulation=4"),
        (needs(remat=("blocks",)), "--config.unet.remat=blocks"),
        (
            needs(remat=("full",), accumulation=2),
            "--config.unet.remat=full --config.accumulation=2",
        ),
        (needs(fsdp=4, images=2), "--config.batch_size=8"),
    ],
)
def test_changes_that_fit_are_named_and_were_tried(memory, said):
    config = txt2img.get_config("smoke")
    attempt, asked = attempt_with(memory)
    found = search.changes_that_fit(config, "diffusion", 8, SLICES, attempt, parts)
    assert found is not None and found[0].endswith(said)
    tried, images = asked[-1]
    assert memory(tried, images) <= AVAILABLE
    for flag in found[0].split():
        key, _, value = flag.removeprefix("--config.").partition("=")
        if key == "batch_size":
            assert images * 4 == int(value)
            continue
        at = tried
        for part in key.split("."):
            at = at[part]
        assert str(at) == value
    assert config == txt2img.get_config("smoke")  # the run's own is left alone


def test_parameters_are_split_within_slices():
    two = Slices(CHIP, (2, 2), 2)
    attempt, _ = attempt_with(needs(fsdp=4))
    found = search.changes_that_fit(
        txt2img.get_config("smoke"), "diffusion", 8, two, attempt, lambda config: 8
    )
    assert found is not None
    assert found[0] == "--config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=1"


def test_what_is_split_already_is_not_proposed():
    config = txt2img.get_config("smoke")
    config.mesh.data, config.mesh.fsdp = 1, -1
    attempt, asked = attempt_with(lambda config, images: 300.0 * images)
    found = search.changes_that_fit(config, "diffusion", 8, SLICES, attempt, parts)
    assert found is not None and "mesh" not in found[0]
    assert asked[0][0].accumulation == 2  # the first that is tried


def test_a_smaller_batch_needs_no_micro_batches():
    config = txt2img.get_config("smoke")
    config.accumulation = 2
    attempt, asked = attempt_with(needs(fsdp=4, images=2))
    found = search.changes_that_fit(config, "diffusion", 8, SLICES, attempt, parts)
    assert found is not None
    assert found[0].endswith("--config.accumulation=1 --config.batch_size=8")
    assert asked[-1][0].accumulation == 1


def test_chips_that_share_images():
    config = txt2img.get_config("smoke")
    config.mesh.data, config.mesh.tensor = 1, 4
    attempt, asked = attempt_with(needs(fsdp=4))
    found = search.changes_that_fit(config, "diffusion", 8, SLICES, attempt, parts)
    assert found is not None and found[0].endswith("--config.mesh.tensor=1")
    assert asked[-1][1] == 2  # of four chips, the same batch
    attempt, asked = attempt_with(needs(accumulation=2))  # 4 chips do not divide 2 images
    found = search.changes_that_fit(config, "diffusion", 2, SLICES, attempt, parts)
    assert found is not None and found[0] == "--config.accumulation=2"


@pytest.mark.parametrize(
    ("policy", "tried"),
    [("dots", ["dots", "blocks", "full", "offload"]), ("full", ["full", "offload"])],
)
def test_what_keeps_more_than_the_configs_own_is_not_tried(policy, tried):
    config = txt2img.get_config("smoke")
    config.unet.remat = policy
    attempt, asked = attempt_with(lambda config, images: 2000.0)
    assert search.changes_that_fit(config, "diffusion", 8, SLICES, attempt, parts) is None
    assert list(dict.fromkeys(changed.unet.remat for changed, _ in asked)) == tried


def test_what_never_fits():
    attempt, _ = attempt_with(lambda config, images: 2000.0)
    config = txt2img.get_config("smoke")
    assert search.changes_that_fit(config, "diffusion", 8, SLICES, attempt, parts) is None
    assert search.changes_that_fit(config, "sample", 8, SLICES, attempt, parts) is None


def test_samplers_are_given_fewer_images():
    attempt, asked = attempt_with(lambda config, images: 300.0 * images)
    found = search.changes_that_fit(
        txt2img.get_config("smoke"), "sample", 16, SLICES, attempt, parts
    )
    assert found is not None and found[0] == "--config.sample.batch_size=2"
    assert [images for _, images in asked] == [8, 4, 2]

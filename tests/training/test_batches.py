"""Batches ahead of the loop: in order, each with its position, and as many as are trained on."""

import pytest

from latent_diffusion_jax.runtime.errors import DataError
from latent_diffusion_jax.training.batches import Ahead


class Loader:
    """Gives 10, 11, ... and fails at some."""

    def __init__(self, *bad):
        self._next, self._bad = 10, bad

    def get_state(self):
        return self._next

    def __next__(self):
        if self._next in self._bad:
            raise DataError(f"{self._next} is gone")
        self._next += 1
        return self._next - 1


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_batches_as_are_trained_on(spare, count):
    loader = Loader(10 + count)  # one more could not be read
    ahead = Ahead(loader, str, count, spare)
    for i in range(count):
        assert (ahead.batch, ahead.position) == (str(10 + i), 10 + i)
        assert ahead.advance() >= 0.0
    assert (ahead.batch, ahead.position, ahead.error) == (None, 10 + count, None)


def test_the_spare_ones_last_until_processes_agree():
    """Where the next batch cannot be read, the one before it is not trained on twice."""
    ahead, trained = Ahead(Loader(17), str, 100, spare=3), []
    while ahead.error is None:
        trained.append(ahead.batch)
        ahead.advance()
    assert trained == ["10", "11", "12", "13"]  # and after this step it is known
    for _ in range(3):
        trained.append(ahead.batch)
        ahead.advance()
    assert trained == [str(i) for i in range(10, 17)]
    assert (ahead.batch, ahead.position) == (None, 17)
    assert str(ahead.error) == "17 is gone"


@pytest.mark.parametrize("bad", [10, 11, 13])
def test_a_run_does_not_begin_with_fewer(bad):
    with pytest.raises(DataError, match=f"{bad} is gone"):
        Ahead(Loader(bad), str, 100, spare=3)
    Ahead(Loader(14), str, 100, spare=3)

"""Which checkpoints of a stage stay."""

import json

from latent_diffusion_jax.training.keeper import SCORES, Keeping, open_keeper


def test_scores_of_checkpoints_that_a_kill_has_prevented_are_forgotten(tmp_path):
    (tmp_path / "4").mkdir()  # as whole as its name says
    (tmp_path / SCORES).write_text(json.dumps({"figure": "loss", "scores": {"4": 0.3, "6": 0.1}}))
    with open_keeper(tmp_path, Keeping(best="loss")) as keeper:
        assert keeper.last() == 4
        assert keeper.has_score(4) and not keeper.has_score(6)

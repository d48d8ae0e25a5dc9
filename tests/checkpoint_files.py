"""Checkpoints whose items say something else than was saved, and are whole."""

import json

from latent_diffusion_jax.runtime import digests


def rewrite_item(folder, item, value):
    """Puts another value into a checkpoint's folder, with the digest of that."""
    (folder / item / "metadata").write_text(json.dumps(value))
    path = folder / "digests" / "metadata"
    known = json.loads(path.read_text())
    assert item in known["items"]
    known["items"][item] = digests.of_json(value)
    path.write_text(json.dumps(known))

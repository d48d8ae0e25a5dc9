"""CLIP's text encoders in and out of transformers' folders and Stable Diffusion's single files."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from transformers import CLIPTextModel

from latent_diffusion_jax.models.clip_text import ClipTextEncoder
from latent_diffusion_jax.runtime.errors import UserError
from latent_diffusion_jax.runtime.trees import flatten_names
from latent_diffusion_jax.weights import clip_text, files
from tests.clip_files import make_text_encoder_folder, text_model

VOCAB, LENGTH = 40, 9
TOKENS = np.array([[38, 3, 7, 7, 1, 39, 39, 39, 39], [38, 19, 2, 5, 6, 7, 8, 4, 39]])
FIELDS = dict(
    vocab_size=VOCAB, width=32, depth=3, num_heads=4, max_length=LENGTH, hidden_width=48,
    activation="gelu", output_layer=-1, final_norm=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that transformers saved; not to be changed."""
    path = tmp_path_factory.mktemp("clip") / "text_encoder"
    make_text_encoder_folder(path, VOCAB, hidden_act="gelu", max_position_embeddings=LENGTH)
    return path


@pytest.fixture
def changed(folder, tmp_path):
    """A copy of the folder with other values in its config."""

    def change(**values):
        place = tmp_path / "changed"
        shutil.copytree(folder, place)
        config = json.loads((place / "config.json").read_text()) | values
        (place / "config.json").write_text(json.dumps(config))
        return place

    return change


def encode(loaded, tokens=TOKENS):
    network = ClipTextEncoder(**loaded.fields)
    return np.asarray(jax.jit(network.apply)({"params": loaded.params}, tokens))


def torch_encode(model, tokens=TOKENS):
    with torch.no_grad():
        return model(torch.tensor(tokens)).last_hidden_state.numpy()


def assert_close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def assert_same_tree(a, b):
    a, b = flatten_names(a), flatten_names(b)
    assert a.keys() == b.keys()
    for name, leaf in a.items():
        np.testing.assert_array_equal(leaf, b[name], err_msg=name)


def numpy_state(model):
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


# Folders of transformers.


def test_a_folder_of_transformers(folder):
    loaded = clip_text.load(str(folder))
    assert loaded.fields == FIELDS
    for leaf in jax.tree.leaves(loaded.params):
        assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32 and leaf.flags.writeable
    assert_close(encode(loaded), torch_encode(CLIPTextModel.from_pretrained(folder)))


@pytest.mark.parametrize("name", clip_text.WEIGHTS_FILES)
def test_every_file_that_is_known(folder, tmp_path, name):
    shutil.copy(folder / "config.json", tmp_path)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    if "fp16" in name:
        state = {key: tensor.half() for key, tensor in state.items()}
    save = torch.save if name.endswith(".bin") else safetensors.torch.save_file
    save(state, tmp_path / name)
    found, wanted = clip_text.load(tmp_path).params, clip_text.load(folder).params
    rounded = jax.tree.map(lambda x: np.float16(x) if "fp16" in name else x, wanted)
    assert_same_tree(found, rounded)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("constant", [np.int64, np.float32])
def test_names_of_older_and_newer_transformers(folder, tmp_path, prefix, constant):
    shutil.copy(folder / "config.json", tmp_path)
    state = files.read(folder / "model.safetensors")
    state = {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    state[f"{prefix}embeddings.position_ids"] = np.arange(LENGTH, dtype=constant)[None]
    state["text_projection.weight"] = np.zeros((32, 32), np.float32)
    files.write(tmp_path / "model.safetensors", state)
    assert_same_tree(clip_text.load(tmp_path).params, clip_text.load(folder).params)


def test_round_trip_through_a_folder(folder, tmp_path):
    loaded = clip_text.load(folder)
    clip_text.save_hf(tmp_path / "new", loaded.fields, loaded.params)
    again = clip_text.load(tmp_path / "new")
    assert again.fields == loaded.fields
    assert_same_tree(again.params, loaded.params)
    theirs, info = CLIPTextModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not any(info.values())
    original = numpy_state(CLIPTextModel.from_pretrained(folder))
    for name, tensor in numpy_state(theirs).items():
        np.testing.assert_array_equal(tensor, original[name])
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (VOCAB - 2, VOCAB - 1)


def test_the_layers_that_are_run_are_written(folder, tmp_path):
    """As in the folders of Stable Diffusion 2."""
    fields = FIELDS | dict(depth=4, output_layer=-2)
    loaded = clip_text.load(folder)
    clip_text.save_hf(tmp_path, fields, loaded.params)
    assert clip_text.load(tmp_path).fields == FIELDS


def test_a_config_may_leave_out_what_transformers_assumes():
    fields = clip_text.read_config({"model_type": "clip_text_model"}, "here")
    assert fields == dict(
        vocab_size=49408, width=512, depth=12, num_heads=8, max_length=77, hidden_width=2048,
        activation="quick_gelu", output_layer=-1, final_norm=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(model_type="bert"), "model_type 'bert'; CLIP's text encoders have 'clip_text_model'"),
        (dict(hidden_act="gelu_new"), "hidden_act 'gelu_new'; known are quick_gelu, gelu"),
        (dict(layer_norm_eps=1e-6), "layer_norm_eps 1e-06, this network has 1e-05"),
        (dict(num_attention_heads=5), "num_attention_heads 5, which do not divide hidden_size 32"),
        (dict(num_hidden_layers="3"), "num_hidden_layers"),
        (dict(num_hidden_layers=4), "missing: 'encoder.layers.3."),
        (dict(num_hidden_layers=2), "extra: 'encoder.layers.2."),
        (dict(vocab_size=41), "misshapen: 'embeddings.token_embedding.weight' (40, 32), expected"),
    ],
)
def test_configs_that_do_not_fit(changed, values, message):
    with pytest.raises(UserError) as error:
        clip_text.load(place := changed(**values))
    assert message in str(error.value) and str(place) in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(UserError, match=r"no-such/config\.json"):
        clip_text.load(tmp_path / "no-such")
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"has neither model\.safetensors nor pytorch_model\.bin"):
        clip_text.load(tmp_path)


def test_a_network_that_transformers_has_not(tmp_path):
    with pytest.raises(UserError, match="cannot express final_norm=False"):
        clip_text.save_hf(tmp_path, FIELDS | dict(final_norm=False), {})


# Stable Diffusion 1's single files.


def single_file(model):
    """As CompVis' code names the tensors of transformers' class."""
    state = {
        f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}": tensor
        for name, tensor in numpy_state(model).items()
    }
    constant = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    others = {"model.diffusion_model.out.2.bias": np.zeros(4), "betas": np.zeros(3)}
    return state | others | {constant: np.arange(LENGTH)[None]}


def test_a_single_file_with_the_class_of_transformers():
    model = text_model(VOCAB, max_position_embeddings=LENGTH)
    tensors = single_file(model)
    loaded = clip_text.from_compvis(tensors, "sd.ckpt", num_heads=4)
    assert loaded.fields == FIELDS | dict(activation="quick_gelu")
    assert_close(encode(loaded), torch_encode(model))
    written = clip_text.to_compvis(loaded.fields, loaded.params)
    assert written.keys() == {name for name in tensors if "text_model" in name} - {
        "cond_stage_model.transformer.text_model.embeddings.position_ids"
    }
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, tensors[name])


def test_heads_have_64_channels_where_nothing_is_said():
    model = text_model(
        VOCAB, max_position_embeddings=LENGTH, hidden_size=128, num_attention_heads=2
    )
    loaded = clip_text.from_compvis(single_file(model), "sd.ckpt")
    assert loaded.fields["num_heads"] == 2
    assert_close(encode(loaded), torch_encode(model))


# Stable Diffusion 2's single files.


class ResidualBlock(torch.nn.Module):
    """A layer of OpenCLIP, of PyTorch's own multi-head attention."""

    def __init__(self, width: int, heads: int, hidden: int):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = torch.nn.ModuleDict(
            {"c_fc": torch.nn.Linear(width, hidden), "c_proj": torch.nn.Linear(hidden, width)}
        )

    def forward(self, x):
        h, mask = self.ln_1(x), torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=mask)[0]
        h = torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)))
        return x + self.mlp["c_proj"](h)


class OpenClip(torch.nn.Module):
    """OpenCLIP's text tower, and the context that Stable Diffusion 2 takes from it."""

    def __init__(self, width=32, depth=3, heads=4, hidden=48):
        super().__init__()
        self.token_embedding = torch.nn.Embedding(VOCAB, width)
        self.positional_embedding = torch.nn.Parameter(0.3 * torch.randn(LENGTH, width))
        self.transformer = torch.nn.ModuleDict(
            {"resblocks": torch.nn.ModuleList(
                ResidualBlock(width, heads, hidden) for _ in range(depth)
            )}
        )  # fmt: skip
        self.ln_final = torch.nn.LayerNorm(width)
        self.text_projection = torch.nn.Parameter(torch.randn(width, width))
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def forward(self, tokens):
        x = self.token_embedding(tokens) + self.positional_embedding
        for block in self.transformer["resblocks"][:-1]:
            x = block(x)
        return self.ln_final(x)


@pytest.fixture(scope="module")
def openclip():
    torch.manual_seed(0)
    model = OpenClip()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def openclip_file(openclip):
    state = numpy_state(openclip)
    assert "transformer.resblocks.2.attn.in_proj_weight" in state
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in state.items()}


def test_a_single_file_with_openclip(openclip, openclip_file):
    loaded = clip_text.from_compvis(openclip_file, "sd2.ckpt", num_heads=4)
    assert loaded.fields == FIELDS | dict(output_layer=-2)
    with torch.no_grad():
        assert_close(encode(loaded), openclip(torch.tensor(TOKENS)).numpy())


def test_openclip_as_diffusers_converts_it(openclip_file, tmp_path):
    """Its folders have no last layer, and the function is the same."""
    model = text_model(
        VOCAB, max_position_embeddings=LENGTH, hidden_act="gelu", num_hidden_layers=2
    )
    checkpoint = {name: torch.tensor(tensor) for name, tensor in openclip_file.items()
                  if ".resblocks.2." not in name}  # fmt: skip
    converted = convert_open_clip_checkpoint(model, checkpoint)
    names = model.state_dict().keys()
    state = {name: converted.get(name, converted.get(f"text_model.{name}")) for name in names}
    model.load_state_dict(state, strict=True)
    loaded = clip_text.from_compvis(openclip_file, "sd2.ckpt", num_heads=4)
    assert_close(encode(loaded), torch_encode(model))
    clip_text.save_hf(tmp_path, loaded.fields, loaded.params)
    for name, tensor in numpy_state(CLIPTextModel.from_pretrained(tmp_path)).items():
        np.testing.assert_array_equal(tensor, state[name].numpy())


def test_openclip_written_again(openclip_file):
    loaded = clip_text.from_compvis(openclip_file, "sd2.ckpt", num_heads=4)
    written = clip_text.to_compvis(loaded.fields, loaded.params)
    unused = {f"cond_stage_model.model.{name}" for name in ("text_projection", "logit_scale")}
    assert written.keys() == openclip_file.keys() - unused
    for name, tensor in written.items():
        assert tensor.shape == openclip_file[name].shape
        if ".resblocks.2." not in name:
            np.testing.assert_array_equal(tensor, openclip_file[name])
    again = clip_text.from_compvis(written, "again", num_heads=4)
    assert again.fields == loaded.fields
    assert_same_tree(again.params, loaded.params)


def test_a_folder_of_stable_diffusion_2_as_a_single_file(folder):
    loaded = clip_text.load(folder)  # its last layer is the last but one of OpenCLIP
    written = clip_text.to_compvis(loaded.fields, loaded.params)
    again = clip_text.from_compvis(written, "sd2", num_heads=4)
    assert again.fields == FIELDS | dict(depth=4, output_layer=-2)
    assert_same_tree(again.params, loaded.params)


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if not key.endswith(name)}


@pytest.mark.parametrize(
    "change, heads, message",
    [
        (lambda tensors: {"betas": np.zeros(3)}, 4, "sd2.ckpt holds no CLIP text encoder"),
        (without("positional_embedding"), 4, "2-d tensors positional_embedding are missing"),
        (without("resblocks.0.attn.in_proj_bias"), 4, "missing: 'transformer.resblocks.0.attn.k.b"),
        (without("ln_final.bias"), 4, "missing: 'ln_final.bias' (32,)"),
        (lambda tensors: tensors | {"cond_stage_model.model.x": np.zeros(2)}, 4, "extra: 'x' (2,)"),
        (lambda tensors: tensors, None, "width 32, which heads of 64 channels do not divide"),
        (lambda tensors: tensors, 5, "width 32, which 5 heads do not divide"),
        (lambda tensors: {name: x for name, x in tensors.items() if ".resblocks.1." not in name
                          and ".resblocks.2." not in name}, 4, "output_layer -2 must be from -1"),
    ],
)  # fmt: skip
def test_single_files_that_do_not_fit(openclip_file, change, heads, message):
    with pytest.raises(UserError) as error:
        clip_text.from_compvis(change(dict(openclip_file)), "sd2.ckpt", num_heads=heads)
    assert message in str(error.value) and "sd2.ckpt" in str(error.value)
    assert "\n" not in str(error.value)


# Full size.

FULL_SIZE = {
    "ViT-L/14": (dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12), 123_060_480),
    # OpenCLIP's text tower without the last of its 24 layers.
    "ViT-H/14": (
        dict(hidden_size=1024, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"),
        340_387_840,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_equals_transformers(name, tmp_path):
    sizes, count = FULL_SIZE[name]
    sizes = sizes | dict(intermediate_size=4 * sizes["hidden_size"])
    model = make_text_encoder_folder(tmp_path, 49408, **sizes)
    loaded = clip_text.load(tmp_path)
    assert sum(leaf.size for leaf in jax.tree.leaves(loaded.params)) == count
    tokens = np.random.default_rng(0).integers(0, 49408, (2, 77))
    expected = torch_encode(model, tokens)
    np.testing.assert_allclose(
        encode(loaded, tokens), expected, rtol=0, atol=1e-4 * np.abs(expected).max()
    )

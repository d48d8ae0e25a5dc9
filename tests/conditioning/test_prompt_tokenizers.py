"""CLIP's and BERT's tokenizers from their folders, against transformers' own call."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import BertTokenizer, CLIPTokenizer

from latent_diffusion_jax.conditioning import tokenizers
from latent_diffusion_jax.runtime.errors import UserError
from tests.clip_files import END, make_bert_tokenizer_folder, make_tokenizer_folder

PROMPTS = [
    "",
    " ",
    "a red circle",
    "A  RED\ncircle above the blue star ",
    "it's 1024 px, isn't it? (no!)",
    "naïve — “quotes” 日本 😀",
    "wow! !! a!",
    "a photo of the <|endoftext|> red",
    "<|endoftext|><|endoftext|> red",
    "red star " * 60,
    "日本" * 60,
]
KINDS = [
    (make_tokenizer_folder, tokenizers.load_clip),
    (make_bert_tokenizer_folder, tokenizers.load_bert),
]


@pytest.fixture(scope="module", params=[END, "!"], ids=["sd1", "sd2"])
def clip(request, tmp_path_factory):
    """A folder, and its vocabulary's size."""
    folder = tmp_path_factory.mktemp("clip") / "tokenizer"
    return folder, make_tokenizer_folder(folder, pad=request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert") / "tokenizer"
    return folder, make_bert_tokenizer_folder(folder)


def called(tokenizer, prompts=PROMPTS, length=77):
    """What transformers' own call gives."""
    found = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=length, return_tensors="np"
    )
    return found["input_ids"]


@pytest.mark.parametrize("length", [77, 12])
def test_clip_equals_transformers(clip, length):
    folder, vocab_size = clip
    tokenizer = tokenizers.load_clip(str(folder), vocab_size, length)
    found = tokenizer.encode(PROMPTS)
    assert found.dtype == np.int32 and found.shape == (len(PROMPTS), length)
    np.testing.assert_array_equal(
        found, called(CLIPTokenizer.from_pretrained(folder), length=length)
    )
    assert (tokenizer.max_length, tokenizer.vocab_size) == (length, vocab_size)
    pad = 0 if json.loads((folder / "tokenizer_config.json").read_text())["pad_token"] == "!" else (
        vocab_size - 1
    )  # fmt: skip
    expected = [vocab_size - 2, vocab_size - 1] + (length - 2) * [pad]
    np.testing.assert_array_equal(tokenizer.null, expected)


def test_bert_equals_transformers(bert):
    folder, vocab_size = bert
    tokenizer = tokenizers.load_bert(folder, vocab_size)
    found = tokenizer.encode(PROMPTS)
    np.testing.assert_array_equal(found, called(BertTokenizer.from_pretrained(folder)))
    np.testing.assert_array_equal(tokenizer.null, [2, 3] + 75 * [0])
    assert tokenizer.vocab_size == vocab_size


def test_bert_keeps_to_its_settings(bert, tmp_path):
    shutil.copytree(bert[0], tmp_path / "cased")
    settings = tmp_path / "cased" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"do_lower_case": False}))
    lower, cased = (tokenizers.load_bert(folder) for folder in (bert[0], tmp_path / "cased"))
    assert (lower.encode(["Red"]) == lower.encode(["red"])).all()
    assert (cased.encode(["Red"]) != cased.encode(["red"])).any()
    np.testing.assert_array_equal(
        cased.encode(PROMPTS), called(BertTokenizer.from_pretrained(tmp_path / "cased"))
    )


def test_no_prompts(clip):
    tokenizer = tokenizers.load_clip(clip[0])
    assert tokenizer.encode([]).shape == (0, 77)


def test_every_text_is_known(clip):
    tokenizer = tokenizers.load_clip(clip[0])
    row = list(tokenizer.encode(["naïve 日本 😀"])[0])
    end = tokenizer.null[1]
    assert end not in row[1 : row.index(end)] and len(row[1 : row.index(end)]) > 10


def test_from_tokenizer_json_alone(clip, tmp_path):
    """As transformers 5 saves it."""
    theirs = CLIPTokenizer.from_pretrained(clip[0])
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    tokenizer = tokenizers.load_clip(tmp_path, clip[1])
    np.testing.assert_array_equal(tokenizer.encode(PROMPTS), called(theirs))
    assert tokenizer.files.keys() == {"tokenizer.json", "tokenizer_config.json"}


def test_without_settings_the_defaults_hold(clip, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(clip[0] / name, tmp_path)
    tokenizer = tokenizers.load_clip(tmp_path, clip[1])
    np.testing.assert_array_equal(tokenizer.null[1:], 76 * [clip[1] - 1])


@pytest.mark.parametrize("make, load", KINDS)
def test_save_writes_the_same_files(make, load, tmp_path):
    folder = tmp_path / "original"
    vocab_size = make(folder)
    tokenizer = load(folder, vocab_size)
    tokenizer.save(tmp_path / "a" / "b")
    written = {path.name: path.read_bytes() for path in (tmp_path / "a" / "b").iterdir()}
    assert written == {path.name: path.read_bytes() for path in folder.iterdir()}
    again = load(tmp_path / "a" / "b", vocab_size)
    np.testing.assert_array_equal(again.encode(PROMPTS), tokenizer.encode(PROMPTS))


def test_save_where_a_file_is_in_the_way(clip, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the tokenizer to"):
        tokenizers.load_clip(clip[0]).save(tmp_path / "file")


def test_ours_have_the_same_face(tmp_path):
    texts = ["a red circle", "a blue star"]
    ours = tokenizers.train(texts, vocab_size=300, max_length=8)
    tokenizer = tokenizers.prompt_tokenizer(ours)
    assert (tokenizer.max_length, tokenizer.vocab_size) == (8, ours.get_vocab_size())
    np.testing.assert_array_equal(tokenizer.encode(PROMPTS), tokenizers.encode(ours, PROMPTS))
    np.testing.assert_array_equal(tokenizer.null, tokenizers.encode(ours, [""])[0])
    tokenizer.save(tmp_path)
    again = tokenizers.load((tmp_path / "tokenizer.json").read_text("utf-8"))
    np.testing.assert_array_equal(tokenizers.encode(again, PROMPTS), tokenizer.encode(PROMPTS))


@pytest.mark.parametrize("make, load", KINDS)
def test_words_are_all_of_the_text(make, load, tmp_path):
    make(tmp_path)
    tokenizer = load(tmp_path, max_length=5)
    is_clip = load is tokenizers.load_clip
    theirs = (CLIPTokenizer if is_clip else BertTokenizer).from_pretrained(tmp_path)
    for prompt in PROMPTS:
        found = [token for word in tokenizer.words(prompt) for token, _ in word]
        assert found == theirs(prompt, add_special_tokens=False)["input_ids"]
    words = tokenizer.words("the red circles, 日本")
    starts = [word[0][1] for word in words]
    assert starts == ([0, 4, 8, 15, 17] if is_clip else [0, 4, 8, 15, 17, 18])


def test_workers_of_the_data_pipeline_can_have_it(clip):
    tokenizer = tokenizers.load_clip(clip[0])
    copy = pickle.loads(pickle.dumps(tokenizer))
    np.testing.assert_array_equal(copy.encode(PROMPTS), tokenizer.encode(PROMPTS))


# What is refused.


@pytest.mark.parametrize(
    "load, wanted",
    [
        (
            tokenizers.load_clip,
            r"CLIPTokenizer: it needs vocab\.json and merges\.txt, or tokenizer",
        ),
        (tokenizers.load_bert, r"BertTokenizer: it needs vocab\.txt, or tokenizer\.json"),
    ],
)
def test_missing_files(load, wanted, tmp_path):
    with pytest.raises(UserError, match=r"there is no tokenizer folder .*no-such"):
        load(tmp_path / "no-such")
    with pytest.raises(UserError, match=wanted):
        load(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_half_of_the_files(clip, tmp_path, name):
    shutil.copy(clip[0] / name, tmp_path)
    with pytest.raises(UserError, match=r"holds no CLIPTokenizer"):
        tokenizers.load_clip(tmp_path)


def test_the_name_of_a_hub_is_no_folder():
    with pytest.raises(UserError, match="there is no tokenizer folder"):
        tokenizers.load_clip("openai/clip-vit-large-patch14")


def test_another_checkpoints_tokenizer(clip, bert):
    with pytest.raises(UserError, match=r"has \d+ tokens and the text encoder 49408: it is not"):
        tokenizers.load_clip(clip[0], vocab_size=49408)
    with pytest.raises(UserError, match=r"has \d+ tokens and the text encoder 30522: it is not"):
        tokenizers.load_bert(bert[0], vocab_size=30522)


def test_an_empty_vocabulary(tmp_path):
    (tmp_path / "vocab.json").write_text('{"<|startoftext|>": 0, "<|endoftext|>": 1}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(UserError, match="is empty: it has 2 tokens"):
        tokenizers.load_clip(tmp_path)


def test_merges_that_are_cut_short(clip, tmp_path):
    shutil.copytree(clip[0], tmp_path / "short")
    lines = (clip[0] / "merges.txt").read_text().splitlines()
    (tmp_path / "short" / "merges.txt").write_text("\n".join(lines[:-2]))
    with pytest.raises(UserError, match=r"short is cut short: it makes none of 2 tokens"):
        tokenizers.load_clip(tmp_path / "short", clip[1])


LOAD_ALONE = """
import importlib.util, socket, sys

def refuse(*arguments, **keywords):
    raise OSError("the network was asked")

socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: (
    None if name.split(".")[0] == "torch" else find(name, package)
)
from latent_diffusion_jax.conditioning import tokenizers
assert "transformers" not in sys.modules
print(tokenizers.load_clip(sys.argv[1]).encode(["a red star"])[0, :5].tolist())
assert "torch" not in sys.modules
"""


def test_neither_the_network_nor_torch_is_needed(clip):
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(clip[0])],
        env=env | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == tokenizers.load_clip(clip[0]).encode(["a red star"])[0, :5].tolist()
    assert done.stderr == ""


@pytest.mark.parametrize(
    "name, content",
    [
        ("vocab.json", b"{oops"),
        ("vocab.json", b"[1, 2]"),
        ("vocab.json", b"\xff\xfe"),
        ("merges.txt", b"#version: 0.2\nfoo bar baz\n"),
        ("merges.txt", b"#version: 0.2\nq z\n"),
        ("tokenizer_config.json", b"{oops"),
    ],
)
def test_damaged_files(clip, tmp_path, name, content):
    shutil.copytree(clip[0], tmp_path / "damaged")
    (tmp_path / "damaged" / name).write_bytes(content)
    with pytest.raises(UserError, match=r"^(cannot read )?the tokenizer in [^\n]+damaged"):
        tokenizers.load_clip(tmp_path / "damaged", clip[1])


@pytest.mark.parametrize(
    ("token", "i", "message"),
    [
        ("a</w>", 10**6, r"the token 'a</w>' has the id 1000000; the ids of \d+ tokens are 0 to"),
        ("a</w>", 2**33, r"the token 'a</w>' has the id 8589934592; the ids of"),
        ("a</w>", 0, r"the tokens '!' and 'a</w>' share the id 0"),
        ("new", 2**33, r"the token 'new' has the id 8589934592; the ids of"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["vocab.json", "tokenizer.json"])
def test_ids_that_the_text_encoder_has_no_vector_for(clip, tmp_path, as_json, token, i, message):
    if as_json:
        CLIPTokenizer.from_pretrained(clip[0]).save_pretrained(tmp_path)
    else:
        shutil.copytree(clip[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / ("tokenizer.json" if as_json else "vocab.json")
    written = json.loads(path.read_text("utf-8"))
    (written["model"]["vocab"] if as_json else written)[token] = i
    path.write_text(json.dumps(written), "utf-8")
    with pytest.raises(UserError, match=rf"^cannot read the tokenizer in .*: {message}"):
        tokenizers.load_clip(tmp_path, clip[1])


def test_two_lines_of_one_token(bert, tmp_path):
    shutil.copytree(bert[0], tmp_path, dirs_exist_ok=True)
    with (tmp_path / "vocab.txt").open("a") as file:
        file.write("\nred\n")
    with pytest.raises(UserError, match=r"cannot read .* token 'red' has the id \d+; the ids of"):
        tokenizers.load_bert(tmp_path)


def test_added_tokens_have_the_ids_that_follow(clip, tmp_path):
    """As textual inversion adds them."""
    theirs = CLIPTokenizer.from_pretrained(clip[0])
    theirs.add_tokens(["<duck>", "<goose>"])
    theirs.save_pretrained(tmp_path)
    tokenizer = tokenizers.load_clip(tmp_path, clip[1] + 2)
    prompts = ["a red <duck>", "<goose> of <duck>"]
    np.testing.assert_array_equal(tokenizer.encode(prompts), called(theirs, prompts))
    assert tokenizer.encode(prompts).max() == clip[1] + 1


@pytest.mark.parametrize("make, load", KINDS)
def test_padding_and_cutting_are_at_the_right(make, load, tmp_path):
    vocab_size = make(tmp_path)
    expected = load(tmp_path, vocab_size).encode(PROMPTS)
    path = tmp_path / "tokenizer_config.json"
    sides = {"padding_side": "left", "truncation_side": "left", "stride": 16}
    path.write_text(json.dumps(json.loads(path.read_text()) | sides))
    np.testing.assert_array_equal(load(tmp_path, vocab_size).encode(PROMPTS), expected)


def test_stride_and_sides_of_a_tokenizer_json(clip, tmp_path):
    theirs = CLIPTokenizer.from_pretrained(clip[0])
    expected = called(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    written = json.loads(path.read_text())
    written["truncation"] = {
        "direction": "Left", "max_length": 77, "strategy": "OnlySecond", "stride": 16
    }  # fmt: skip
    written["padding"] = {
        "strategy": {"Fixed": 77}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 10**6, "pad_type_id": 0, "pad_token": END,
    }  # fmt: skip
    written["post_processor"] = None
    path.write_text(json.dumps(written))
    np.testing.assert_array_equal(tokenizers.load_clip(tmp_path, clip[1]).encode(PROMPTS), expected)


def test_a_text_encoder_without_room_for_start_and_end(clip):
    with pytest.raises(UserError, match=r"^cannot read the tokenizer in"):
        tokenizers.load_clip(clip[0], max_length=1)


@pytest.mark.parametrize("name", ["merges.txt", "tokenizer.json", "tokenizer_config.json"])
def test_a_pipe_among_the_files(clip, tmp_path, name):
    shutil.copytree(clip[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=r"^cannot read the tokenizer in .*no ordinary file"):
        tokenizers.load_clip(tmp_path)

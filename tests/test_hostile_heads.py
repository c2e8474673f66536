"""Repositories of strangers: whatever they hold, a head loads as it was saved, or is refused with a reason.

Run as a script, this file is the process in which mutated repositories are loaded: with a limit on its memory, a clock
for each load, and a hook that sees every file, process and connection.
"""

import builtins
import contextlib
import faulthandler
import json
import os
import pickle
import random
import resource
import shutil
import string
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from transformers import AutoModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import logging

from hf_layerfusion import LayerFusionConfig, LayerFusionError, ViTForAttentiveLayerFusionClassification
from hf_layerfusion.bank import resolve_layers
from hf_layerfusion.checkpoints import open_config, write_checksums
from hf_layerfusion.layout import TapLayout, TokenLayout

PIXELS = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
RECORD = {"dataset": "animals", "split": "test", "metrics": {"accuracy": 0.9}, "train_images": 30}


def build(folder):
    """A backbone, a head on it, and the same head with its backbone beside it."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**shape, image_size=16, patch_size=8, initializer_range=0.3)
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder / "backbone")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "backbone")
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        folder / "backbone", id2label=["cat", "dog", "owl"], num_heads=2
    )
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.train()(PIXELS)
    model.eval()
    model.save_pretrained(folder / "head")
    model.save_pretrained(folder / "bundle", include_backbone=True)
    for name in ("head", "bundle"):
        (folder / name / "training_record.json").write_text(json.dumps(RECORD))
    return folder


def load(folder, **options):
    return ViTForAttentiveLayerFusionClassification.from_pretrained(folder, **options)


def logits_of(model):
    with torch.no_grad():
        return model(PIXELS).logits


def read(path):
    return json.loads(path.read_text())


def edit(path, reseal=False, **changes):
    path.write_text(json.dumps({**read(path), **changes}))
    if reseal:
        write_checksums(path.parent)


# ---- mutations -----------------------------------------------------------------------------------------------------

TEXTS = {
    "nan": '{"model_type": "layer_fusion", "noise_std": NaN}',
    "infinity": '{"model_type": "layer_fusion", "noise_std": -Infinity}',
    "overflow": '{"model_type": "layer_fusion", "noise_std": 1e999}',
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "shallow list": '{"model_type": "layer_fusion", "layers": ' + "[" * 60 + "]" * 60 + "}",
    "digits": '{"model_type": "layer_fusion", "num_labels": ' + "9" * 5000 + "}",
    "empty": "",
    "null": "null",
    "list": "[]",
    "text": '"layer_fusion"',
    "nothing": "{}",
    "spaces": " " * (25 * 2**20) + "{}",
    "not UTF-8": b"\xff\xfe{\x00}\x00",
    "byte order mark": b"\xef\xbb\xbf{}",
    "zeros": b"\0" * 4096,
}
VALUES = (
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        3,
        10**9,
        -(10**9),
        2**63,
        10**400,
        0.5,
        -0.5,
        1e308,
        1e-308,
        "",
        "x",
        "0",
        "2:",
    ),
    *("0:999999999", "spaced:2", "../../secret", "/etc/passwd", "kernels-community/flash-attn2", "flash_attention_2"),
    *(
        "a" * 10_000,
        "\0",
        "\ud800",
        "nan",
        "float16",
        "bfloat16",
        "float64",
        "load",
        "none",
        "l2",
        "mean",
        "vit",
        "bert",
    ),
    *([], [0], [[]], [1], [2, 1], [10**9], [1, 1], ["mean"], ["tokens"], [10**6, 10**6], [None], {}, {"a": 1}),
    *({"0": None}, {"0": "cat", "1": "dog", "2": "owl", "3": "emu"}, {"height": 10**9, "width": 10**9}),
)
NEW_FIELDS = {
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"},
    "attn_implementation": "kernels-community/flash-attn2",
    "_attn_implementation": "kernels-community/flash-attn2",
    "_attn_implementation_internal": "kernels-community/flash-attn2",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "configuration_files": ["config.4.0.0.json"],
    "transformers_weights": "../outside/model.safetensors",
    "num_labels": 10**9,
    "per_layer_config": {"0": {"hidden_size": 10**9}},
    "fusion_config": {"patch_embeddings": True},
    "to_dict": "gone",
    "__class__": "str",
    "torch_dtype": "load",
    "later_field": 1,
}


def nodes(value, path=()):
    """Paths to all values inside one."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in inside:
        yield (*path, key)
        yield from nodes(child, (*path, key))


def parent_of(values, path):
    for key in path[:-1]:
        values = values[key]
    return values


def flip(folder, rng, _):
    path = folder / rng.choice(sorted(file.name for file in folder.iterdir()))
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(folder, rng, _):
    path = folder / rng.choice(sorted(file.name for file in folder.iterdir()))
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice((0, 1, 7, 8, rng.randrange(len(content)), len(content) - 1))])


def change_json(folder, rng, _):
    name = rng.choices(("config.json", "preprocessor_config.json", "training_record.json"), (8, 2, 1))[0]
    values = read(folder / name)
    path = rng.choice(list(nodes(values)))
    holder = parent_of(values, path)
    action = rng.choice(("value", "value", "value", "value", "delete", "rename", "add", "number"))
    if action == "value":
        holder[path[-1]] = rng.choice(VALUES)
    elif action == "number" and type(holder[path[-1]]) in (int, float):
        holder[path[-1]] += rng.choice((-1, 1, 0.5))
    elif action == "delete":
        del holder[path[-1]]
    elif action == "rename" and isinstance(holder, dict):
        holder[rng.choice(string.ascii_lowercase) + str(path[-1])[1:]] = holder.pop(path[-1])
    else:
        key = rng.choice(sorted(NEW_FIELDS))
        rng.choice([values, values.get("backbone_config", values)])[key] = NEW_FIELDS[key]
    (folder / name).write_text(json.dumps(values))


def change_text(folder, rng, _):
    path = folder / rng.choice(("config.json", "config.json", "preprocessor_config.json", "training_record.json"))
    kind = rng.choice((*TEXTS, "twice"))
    if kind == "twice":
        values = read(path)
        key = rng.choice(sorted(values))
        text = json.dumps(values)[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice((values[key], None)))}}}"
    else:
        text = TEXTS[kind]
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def change_tensors(folder, rng, _):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name, other = rng.sample(sorted(tensors), 2)
    tensor = tensors[name]
    action = rng.choice(("swap", "swap", "rename", "drop", "add", "cast", "reshape", "nan", "copy"))
    if action == "swap":
        pairs = [(a, b) for a in tensors for b in tensors if a < b and tensors[a].shape == tensors[b].shape]
        name, other = rng.choice(pairs)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif action == "rename":
        tensors[rng.choice(("head.other", "../" + name, "backbone." + name, name + "\0", "__proto__"))] = tensors.pop(
            name
        )
    elif action == "drop":
        del tensors[name]
    elif action == "add":
        tensors[rng.choice(("head.adapter", "backbone.other", ""))] = torch.zeros(3)
    elif action == "cast":
        tensors[name] = tensor.to(rng.choice((torch.float64, torch.float16, torch.int32, torch.uint8, torch.bool)))
    elif action == "reshape":
        tensors[name] = rng.choice((tensor[None], tensor.flatten(), torch.cat([tensor.flatten(), tensor.flatten()])))
    elif action == "nan":
        tensors[name] = torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor + 1
    else:
        tensors[name] = tensors[other].clone()
    save_file(tensors, path, {"format": "pt"})


def with_header(content, header):
    """A safetensors file with another header before its data."""
    length = struct.unpack("<Q", content[:8])[0]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def change_header(folder, rng, _):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    name, other = rng.sample(sorted(header.keys() - {"__metadata__"}), 2)
    action = rng.choice(("length", "overlap", "offset", "shape", "dtype", "twice", "field", "metadata", "gap", "deep"))
    if action == "length":
        path.write_bytes(
            struct.pack("<Q", rng.choice((0, 1, length + 1, len(content), 2**32, 2**63, 2**64 - 1))) + content[8:]
        )
        return
    if action == "overlap":
        header[name]["data_offsets"] = header[other]["data_offsets"]
    elif action == "offset":
        header[name]["data_offsets"][rng.randrange(2)] = rng.choice((-1, 0, 10**12, 2**64, 0.5, None, "0"))
    elif action == "shape":
        header[name]["shape"] = rng.choice(([10**9, 10**9], [-1], [], None, [0], [True], [0.5], [1] * 1000))
    elif action == "dtype":
        header[name]["dtype"] = rng.choice(("F64", "BF16", "I32", "F8_E4M3", "U32", "O", "", None, 4, "f32"))
    elif action == "twice":
        header = json.dumps(header).encode()[:-1] + f', "{name}": {json.dumps(header[other])}}}'.encode()
    elif action == "field":
        header[name]["pickle"] = True
    elif action == "metadata":
        header["__metadata__"] = rng.choice(({"format": "tf"}, {"a": 1}, [], None, "x"))
    elif action == "gap":
        header.pop(name)
    else:
        header = b"[" * 50_000
    path.write_bytes(with_header(content, header))


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zip_of(path, name, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)


def change_files(folder, rng, marker):
    """Files that are something else, lie elsewhere, or should not be there."""
    evil = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n"
    outside = folder.parent / "outside"
    names = ("config.json", "model.safetensors", "preprocessor_config.json", "training_record.json")
    path = folder / rng.choice(names)
    action = rng.choice(
        (
            *("pickle", "pickle", "bin", "bin", "zip", "bomb", "empty", "remove", "link", "link", "circle", "nowhere"),
            *("folder", "device", "adapter", "generation", "processor", "code", "index", "index", "sparse", "readme"),
        )
    )
    if action == "pickle":
        path.write_bytes(pickle.dumps(Trap(marker)))
    elif action == "bin":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(marker)))
        if rng.random() < 0.5:
            (folder / "model.safetensors").unlink()
    elif action == "zip":
        zip_of(folder / "model.safetensors", "archive/data.pkl", pickle.dumps(Trap(marker)))
    elif action == "bomb":
        zip_of(path, "archive/data.pkl", b"\0" * 50_000_000)
    elif action == "empty":
        path.write_bytes(b"")
    elif action == "remove":
        path.unlink()
    elif action in ("link", "circle", "nowhere", "device"):
        target = {"link": outside / path.name, "circle": path, "nowhere": outside / "none", "device": "/dev/zero"}[
            action
        ]
        path.unlink()
        path.symlink_to(target)
    elif action == "folder":
        path.unlink()
        path.mkdir()
    elif action == "adapter":
        values = {
            "peft_type": "LORA",
            "base_model_name_or_path": str(outside),
            "auto_mapping": {"parent_library": "evil"},
        }
        (folder / "adapter_config.json").write_text(json.dumps(values))
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(marker)))
    elif action == "generation":
        (folder / "generation_config.json").write_text('{"max_length": 1000000000, "cache_implementation": "evil"}')
    elif action == "processor":
        values = {"image_processor": {"image_processor_type": "Evil", "auto_map": {"AutoImageProcessor": "evil.Evil"}}}
        (folder / "processor_config.json").write_text(json.dumps(values))
        (folder / "evil.py").write_text(evil)
    elif action == "code":
        name = rng.choice(("config.json", "preprocessor_config.json"))
        classes = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor")
        edit(folder / name, auto_map=dict.fromkeys(classes, "evil.Evil"))
        (folder / "evil.py").write_text(evil)
    elif action == "index":
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        place = rng.choice(
            (
                "part.safetensors",
                "../outside/model.safetensors",
                str(outside / "model.safetensors"),
                "pytorch_model.bin",
                3,
            )
        )
        index = {"metadata": {"total_size": 10**12}, "weight_map": {"head.query": place, "head.other": place}}
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(marker)))
        (folder / "model.safetensors.index.json").write_text(
            json.dumps(rng.choice((index, {"weight_map": [place]}, {})))
        )
    elif action == "sparse":
        os.truncate(path, 2**40)
    else:
        (folder / "README.md").write_bytes(rng.randbytes(10_000))


# Name, how many in all, and how many more with checksums that fit, as a malicious author would write them.
MUTATIONS = (
    (flip, 330, 0),
    (truncate, 60, 0),
    (change_json, 350, 350),
    (change_text, 60, 0),
    (change_tensors, 80, 60),
    (change_header, 60, 0),
    (change_files, 60, 0),
)

# Audit events of what loading a head has no reason to do.
FORBIDDEN = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "pickle.")
WRITING = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "shutil.",
)


class Watch:
    """Sees what the process does while a repository is loaded."""

    def __init__(self):
        self.seen = None
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.seen is None:
            return
        if event.startswith((*FORBIDDEN, *WRITING)):
            self.seen.append(f"{event} {arguments[:1]}")
        elif event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            path, _, flags = arguments
            name = os.fsdecode(path)
            is_writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if (is_writing and name != os.devnull) or name.endswith((".bin", "evil.py")) or "/outside/" in name:
                self.seen.append(f"open {name} {flags}")


def load_mutated(folder):
    """Load every mutated repository and print what came of each."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    builtins.input = lambda *_: os._exit(3)
    backbone = AutoModel.from_pretrained(folder / "backbone", add_pooling_layer=False)
    expected = logits_of(load(folder / "head", backbone=backbone))
    assert torch.equal(logits_of(load(folder / "bundle")), expected)
    shutil.copytree(folder / "head", folder / "case" / "outside")
    case, marker = folder / "case" / "head", folder / "sprung"
    watch = Watch()
    watch.seen = []
    pickle.loads(pickle.dumps(Trap(marker)))
    assert watch.seen
    assert marker.exists(), "the trap works"
    marker.unlink()
    watch.seen = None
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for mutate, count, resealed in MUTATIONS:
        for number in range(count + resealed):
            rng = random.Random(f"{mutate.__name__} {number}")
            kind = rng.choice(("head", "head", "bundle"))
            shutil.rmtree(case, ignore_errors=True)
            shutil.copytree(folder / kind, case)
            mutate(case, rng, marker)
            if number >= count:
                with contextlib.suppress(LayerFusionError, TypeError):
                    write_checksums(case)
            report = {"name": f"{mutate.__name__} {number}", "kind": kind, "resealed": number >= count}
            faulthandler.dump_traceback_later(60, exit=True)
            watch.seen = []
            try:
                model = load(case, backbone=None if kind == "bundle" else backbone)
                report["outcome"] = "loaded"
                if number < count:
                    report["is_same"] = torch.equal(logits_of(model), expected)
            except LayerFusionError as error:
                report |= {"outcome": "refused", "message": str(error)[:300]}
            except BaseException as error:
                report |= {"outcome": f"{type(error).__name__}: {error}"[:300]}
            report["seen"], watch.seen = watch.seen, None
            faulthandler.cancel_dump_traceback_later()
            if marker.exists():
                report["seen"].append("code ran")
                marker.unlink()
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    load_mutated(Path(sys.argv[1]))
    sys.exit(0)


# ---- all of them ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hostile"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_mutated_repositories(saved, tmp_path):
    """Each loads with the same logits or is refused; none runs code, writes, takes 1 GB or hangs."""
    shutil.copytree(saved, tmp_path / "saved")
    done = subprocess.run(
        [sys.executable, __file__, tmp_path / "saved"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=1100,  # half a minute of work, on a machine that may have ten other things to do
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == sum(count + resealed for _, count, resealed in MUTATIONS)
    assert sum(not report["resealed"] for report in reports) == 1000
    wrong = [report for report in reports if report["outcome"] not in ("loaded", "refused")]
    wrong += [report for report in reports if report.get("is_same") is False or report["seen"]]
    assert not wrong, "\n".join(map(str, wrong[:20]))
    # Were all of them refused, or none, this test would show nothing.
    loaded = sum(report["outcome"] == "loaded" for report in reports if not report["resealed"])
    assert 100 < loaded < 500


# ---- one by one ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(saved):
    return AutoModel.from_pretrained(saved / "backbone", add_pooling_layer=False)


@pytest.fixture(scope="module")
def expected(saved, backbone):
    return logits_of(load(saved / "head", backbone=backbone))


@pytest.fixture
def head(saved, tmp_path):
    return shutil.copytree(saved / "head", tmp_path / "head")


@pytest.fixture
def bundle(saved, tmp_path):
    return shutil.copytree(saved / "bundle", tmp_path / "bundle")


@pytest.fixture
def nobody_answers(monkeypatch):
    """A terminal at which a question fails the test."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))


HUGE_LAYOUT = {"taps": {"block": {"kind": "tokens", "widths": [16] * 3}}, "grids": [[60000, 60000]] * 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_labels": 10**9, "id2label": None, "label2id": None},
            r"num_labels=1000000000: use 1 or more, up to 131072",
        ),
        ({"layers": "0:99999999999999999999"}, "layer 99999999999999999999 is out of range"),
        ({"num_queries": 10**9}, "num_queries=1000000000: use at most 4096"),
        ({"head_dim_multiplier": 10**9}, "head_dim_multiplier=1000000000: use at most 256"),
        ({"image_size": 10**9}, "image_size=1000000000: give height and width"),
        (
            {"pools": ["tokens"], "token_layout": {**HUGE_LAYOUT, "image_size": [60000, 60000]}},
            "gives more than 262144 tokens at layer 1 for images of",
        ),
        (
            {"token_layout": {"taps": {"block": {"kind": "tokens", "widths": [8] * 10**5}}}},
            "has 99999 layers: use 1 to 512",
        ),
        ({"token_layout": {"taps": {"block": {"kind": "tokens", "widths": [10**9] * 3}}}}, "numbers from 0 to 262144"),
        ({"token_layout": {"taps": {"block": {"kind": "tokens", "widths": ["16", 16, 16]}}}}, "give numbers from 0"),
        ({"token_layout": {"evil": 1}}, "token layout .*: give taps, and nothing but"),
        ({"dtype": "load"}, "dtype='load': use one of float64, float32, float16, bfloat16"),
        ({"auto_map": {"AutoConfig": "evil.Evil"}}, "has auto_map=.*code of its own to be run"),
        (
            {"attn_implementation": "kernels-community/x"},
            "attn_implementation='kernels-community/x': it may name code",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "heads are not quantised"),
        ({"configuration_files": ["config.4.0.0.json"]}, "a head has one config.json"),
        ({"transformers_weights": "../x.bin"}, "weights are in model.safetensors"),
        ({"to_dict": 1}, "unknown field 'to_dict'; hf_layerfusion .* writes no such field: the file was edited"),
        (
            {"hf_layerfusion_version": "97.1", "rotation": 3},
            "unknown field 'rotation'; version '97.1' of hf_layerfusion wrote the file, and this is .*: upgrade",
        ),
        (
            {"backbone_revision": "../../../../x"},
            r"backbone_revision='../../../../x': give a commit, a branch or a tag",
        ),
        ({"backbone_fingerprint": {"dtype": "load", "digest": "", "parts": {}}}, "backbone_fingerprint=.* is none"),
        ({"backbone_fingerprint": {"digest": 3}}, "backbone_fingerprint=.* is none"),
        ({"backbone_config": ["vit"]}, r"backbone_config=\['vit'\]: give a config, or its dict"),
        ({"backbone_config": {"model_type": ["vit"]}}, r"model_type \['vit'\], which this version"),
        ({"backbone_config": {"model_type": "vit", "num_labels": 10**9}}, "'num_labels'=1000000000: at most 131072"),
        (
            {"backbone_config": {"model_type": "vit", "num_hidden_layers": 10**9}},
            "'num_hidden_layers'=1000000000: at most",
        ),
        ({"backbone_config": {"model_type": "swin", "depths": [2, 10**9]}}, "'depths'=1000000000: at most 10000"),
        ({"backbone_config": {"model_type": "vit", "to_dict": 1}}, "a field 'to_dict', which no config has"),
        ({"backbone_config": {"model_type": "vit", "__class__": 1}}, "a field '__class__', which no config has"),
        ({"backbone_config": {"model_type": "vit", "hidden_size": "x"}}, "is no config of a 'vit' model"),
        ({"backbone_config": {"model_type": "vit", "dtype": "load"}}, "backbone_config dtype='load'"),
        (
            {"backbone_config": {"model_type": "vit", "_attn_implementation": "kernels-community/x"}},
            "_attn_implementation='kernels-community/x', which may be code from elsewhere",
        ),
        ({"id2label": {"0": ["cat"], "1": "dog", "2": "owl"}}, "id2label"),
        ({"id2label": ["cat"]}, "id2label"),
        ({"class_weights": 3}, "class_weights=3: give one number per class"),
        ({"freeze_backbone": "yes"}, "freeze_backbone='yes': use True or False"),
        ({"modules": {"block": 1}}, "modules and pools are lists of names"),
        ({"model_type": ["layer_fusion"]}, r"holds a \['layer_fusion'\] model, not a head"),
        ({"checksums": {"head": 1}}, "checksums=.* expected one each for"),
    ],
)
def test_configs(head, backbone, changes, message):
    edit(head / "config.json", **changes)
    with pytest.raises(LayerFusionError, match=message):
        load(head, backbone=backbone)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("kind", [*TEXTS, "twice"])
def test_json(head, backbone, name, kind):
    text = '{"layers": [1], "layers": [2]}' if kind == "twice" else TEXTS[kind]
    (head / name).write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(LayerFusionError, match=f"{name}|a None model, not a head"):
        load(head, backbone=backbone)


def test_a_key_that_stands_twice_is_named(head, backbone):
    text = (head / "config.json").read_text()
    (head / "config.json").write_text(text.replace("{", '{"num_queries": 2,', 1))
    with pytest.raises(LayerFusionError, match="'num_queries' stands in it twice"):
        load(head, backbone=backbone)


@pytest.mark.parametrize("spec", ["-8:4", "0:99", "-99:2"])
def test_ranges_of_layers_that_are_not_there(spec):
    with pytest.raises(LayerFusionError):
        resolve_layers(spec, 4)


def test_layouts_are_checked_wherever_they_come_from():
    with pytest.raises(LayerFusionError, match="token layout widths is 'x'"):
        TapLayout("tokens", "x")
    with pytest.raises(LayerFusionError, match="token layout final_norm is 3"):
        TokenLayout({"block": TapLayout("tokens", (8, 8))}, final_norm=3)


# ---- checksums


def swap(tensors):
    tensors["head.norm_k.weight"], tensors["head.norm_v.weight"] = (
        tensors["head.norm_v.weight"],
        tensors["head.norm_k.weight"],
    )


def nudge(tensors):
    tensors["head.classifier.bias"][0] += 1e-7


@pytest.mark.parametrize("damage", [swap, nudge])
@pytest.mark.parametrize("kind", ["head", "bundle"])
def test_other_values_in_the_right_places(request, kind, backbone, damage):
    folder = request.getfixturevalue(kind)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LayerFusionError, match=r"the head in .*safetensors changed since the head was saved"):
        load(folder, backbone=backbone)


@pytest.mark.parametrize(
    "changes", [{"token_normalization": "none"}, {"layers": [1]}, {"dtype": "bfloat16"}, {"num_heads": 4}]
)
def test_other_settings_that_fit_the_same_tensors(head, backbone, changes):
    edit(head / "config.json", **changes)
    with pytest.raises(
        LayerFusionError, match=r"config\.json of .* changed since the head was saved: .* delete 'checksums'"
    ):
        load(head, backbone=backbone)


def test_other_pictures(head, backbone):
    edit(head / "preprocessor_config.json", image_mean=[0.1, 0.1, 0.1])
    with pytest.raises(LayerFusionError, match=r"preprocessor_config\.json changed since the head was saved"):
        load(head, backbone=backbone)


def test_names_may_be_edited(head, backbone, expected):
    labels = {"id2label": {"0": "Katze", "1": "Hund", "2": "Eule"}, "label2id": {"Katze": 0, "Hund": 1, "Eule": 2}}
    edit(head / "config.json", backbone_name_or_path="me/elsewhere", backbone_revision="v1", **labels)
    model = load(head, backbone=backbone)
    assert model.config.id2label[2] == "Eule"
    assert torch.equal(logits_of(model), expected)


def test_heads_without_checksums(head, backbone, expected):
    """As versions before them wrote them, or for whoever means to edit one."""
    values = read(head / "config.json")
    assert values.pop("checksums").keys() == {"settings", "head", "image_processor"}
    assert values.pop("hf_layerfusion_version")
    (head / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits_of(load(head, backbone=backbone)), expected)
    edit(head / "config.json", token_normalization="none")
    assert not torch.equal(logits_of(load(head, backbone=backbone)), expected)


def test_checksums_are_of_what_is_saved_last(head, backbone, tmp_path):
    model = load(head, backbone=backbone)
    assert model.name_or_path == model.config.name_or_path == str(head)
    with torch.no_grad():
        model.head.classifier.bias += 1
    model.image_processor = None
    model.save_pretrained(tmp_path / "other")
    assert torch.equal(logits_of(load(tmp_path / "other", backbone=backbone)), logits_of(model))
    assert read(tmp_path / "other" / "config.json")["checksums"].keys() == {"settings", "head"}
    assert "checksums" not in model.config.to_dict()


def test_a_head_can_be_saved_over_the_file_it_came_from(head, backbone, expected):
    model = load(head, backbone=backbone)
    for _ in range(2):
        model.save_pretrained(head)
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(load(head, backbone=backbone)), expected)


# ---- weights


def test_a_tensor_of_whole_numbers_is_no_weight(head, backbone):
    tensors = load_file(head / "model.safetensors")
    tensors["head.query"] = tensors["head.query"].view(torch.int32)
    save_file(tensors, head / "model.safetensors", {"format": "pt"})
    write_checksums(head)
    with pytest.raises(LayerFusionError, match=r"head\.query is of type I32, which its values cannot have"):
        load(head, backbone=backbone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["a"].update(shape=[10**12]), "'a' is described by"),
        (lambda header: header["a"].update(data_offsets=[0, 2**64]), "'a' is described by"),
        (lambda header: header["a"].update(pickle=True), "'a' is described by"),
        (lambda header: header["b"].update(data_offsets=[0, 8]), "tensors overlap or leave a gap at byte 0"),
        (lambda header: header.pop("b"), "its tensors take 8 bytes, but there are 16"),
    ],
)
def test_headers(head, backbone, change, message):
    content = save({"a": torch.zeros(2), "b": torch.zeros(2)})
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    change(header)
    (head / "model.safetensors").write_bytes(with_header(content, header))
    with pytest.raises(LayerFusionError, match=rf"is not a whole safetensors file \({message}"):
        load(head, backbone=backbone)


def test_an_enormous_header_is_not_read(head, backbone):
    with open(head / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)
    with pytest.raises(LayerFusionError, match="1099511627776 bytes cannot hold a header of 549755813888"):
        load(head, backbone=backbone)


def test_a_large_bundle_in_parts(bundle, saved, expected, backbone):
    model = load(saved / "bundle")
    (bundle / "model.safetensors").unlink()
    model.save_pretrained(bundle, include_backbone=True, max_shard_size="20KB")
    assert not (bundle / "model.safetensors").exists()
    assert torch.equal(logits_of(load(bundle)), expected)
    index = read(bundle / "model.safetensors.index.json")
    first, second = sorted(set(index["weight_map"].values()))[:2]
    shutil.copy(bundle / first, bundle / second)
    with pytest.raises(LayerFusionError, match=r"which another file of .* holds too"):
        load(bundle)


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/tmp/outside.safetensors", "pytorch_model.bin", "..", 3, None]
)
def test_parts_lie_beside_their_index(head, backbone, place):
    (head / "model.safetensors").rename(head.parent / "outside.safetensors")
    (head / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": {"head.query": place}})
    )
    with pytest.raises(LayerFusionError, match="which is no safetensors file beside it"):
        load(head, backbone=backbone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 9000}, "asks for more weights than the checkpoint holds"),
        ({"hidden_size": 2**20}, "asks for more weights than the checkpoint holds"),
        ({"image_size": 2**20, "patch_size": 1}, "asks for more weights than the checkpoint holds"),
        ({"num_attention_heads": 0}, "cannot be built from its config"),
        ({"model_type": "bert"}, "holds a 'bert' model, which is no vision backbone"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "is quantised, which cannot be saved"),
    ],
)
def test_bundled_backbones(bundle, changes, message):
    values = read(bundle / "config.json")
    edit(bundle / "config.json", reseal=True, backbone_config={**values["backbone_config"], **changes})
    with pytest.raises(LayerFusionError, match=message):
        load(bundle)


# ---- files


def test_files_that_are_not_read(head, backbone, expected, tmp_path, nobody_answers):
    marker = tmp_path / "sprung"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (head / name).write_bytes(pickle.dumps(Trap(marker)))
    (head / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "me/evil"}')
    (head / "generation_config.json").write_text("[")
    (head / "processor_config.json").write_text('{"image_processor": {"image_processor_type": "Evil"}}')
    (head / "model.safetensors.index.json").write_text("[")
    (head / "README.md").write_bytes(b"\xff")
    (head / "evil.py").write_text("raise SystemExit")
    assert torch.equal(logits_of(load(head, backbone=backbone)), expected)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_links_out_of_the_folder(head, backbone, name):
    (head / name).rename(head.parent / name)
    (head / name).symlink_to(head.parent / name)
    with pytest.raises(
        LayerFusionError, match=f"{name} is a link that leaves its folder, to .*: put the file itself there"
    ):
        load(head, backbone=backbone)


def test_links_that_do_no_harm(head, backbone, expected, tmp_path):
    (head / "model.safetensors").rename(head / "weights.safetensors")
    (head / "model.safetensors").symlink_to("weights.safetensors")
    (tmp_path / "link").symlink_to(head)
    assert torch.equal(logits_of(load(tmp_path / "link", backbone=backbone)), expected)


def test_a_fifo_is_not_waited_for(head, backbone):
    (head / "model.safetensors").unlink()
    os.mkfifo(head / "model.safetensors")
    with pytest.raises(LayerFusionError, match=r"model\.safetensors is no plain file"):
        load(head, backbone=backbone)


# ---- image processors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": {"height": 10**9, "width": 10**9}}, r"has '(height|width)'=1000000000: no image is like that"),
        ({"size": {"shortest_edge": -1}}, "has 'shortest_edge'=-1"),
        ({"size": 10**6}, "has 'size'=1000000"),
        ({"size": "large"}, r"preprocessor_config\.json cannot be used"),
        ({"rescale_factor": 1e300}, "has 'rescale_factor'=1e[+]300"),
        ({"image_processor_type": "EvilImageProcessor"}, "cannot be used: 'EvilImageProcessor' is not known here"),
        ({"image_processor_type": "AutoModel"}, "image_processor_type='AutoModel', which is no image processor"),
        ({"image_processor_type": "AutoImageProcessor"}, "='AutoImageProcessor', which is no image processor"),
        ({"image_processor_type": None}, "has image_processor_type=None"),
        ({"auto_map": {"AutoImageProcessor": "evil.Evil"}}, "code of its own to be run: pass trust_remote_code=True"),
    ],
)
def test_processors(head, backbone, nobody_answers, changes, message):
    edit(head / "preprocessor_config.json", reseal=True, **changes)
    with pytest.raises(LayerFusionError, match=message):
        load(head, backbone=backbone)


def test_a_processor_that_was_saved_and_is_gone(head, backbone):
    (head / "preprocessor_config.json").unlink()
    with pytest.raises(LayerFusionError, match=r"lacks preprocessor_config\.json, which was saved with the head"):
        load(head, backbone=backbone)


# ---- the backbone that a head names


def test_a_head_of_the_hub_opens_no_folder_of_this_machine(hub, head, saved, tmp_path, expected, monkeypatch):
    repo_id = f"me/{tmp_path.name}"
    hub.upload_folder(head, repo_id)
    with pytest.raises(
        LayerFusionError, match=r"names its backbone .*, which is a folder of this machine: pass the one"
    ):
        load(repo_id)
    assert torch.equal(logits_of(load(repo_id, backbone=saved / "backbone")), expected)
    assert torch.equal(logits_of(load(head)), expected), "a head that was saved here does"
    monkeypatch.chdir(saved)
    edit(head / "config.json", backbone_name_or_path="backbone")
    hub.upload_folder(head, f"{repo_id}-relative")
    with pytest.raises(LayerFusionError, match="'backbone', which is a folder of this machine"):
        load(f"{repo_id}-relative")
    edit(head / "config.json", backbone_name_or_path="../outside")
    hub.upload_folder(head, f"{repo_id}-outside")
    with pytest.raises(LayerFusionError, match=r"'\.\./outside', which is no repository of the Hub"):
        load(f"{repo_id}-outside")


def test_a_folder_in_the_cache_of_the_hub(hub, head, backbone, expected, tmp_path):
    """It consists of links, and what it holds came from the Hub."""
    from huggingface_hub import snapshot_download

    repo_id = f"me/{tmp_path.name}"
    hub.upload_folder(head, repo_id)
    folder = snapshot_download(repo_id)
    assert Path(folder, "config.json").is_symlink()
    assert torch.equal(logits_of(load(folder, backbone=backbone)), expected)
    with pytest.raises(LayerFusionError, match="which is a folder of this machine"):
        load(folder)


def test_code_of_a_backbone_is_not_asked_about(saved, tmp_path, nobody_answers):
    folder = shutil.copytree(saved / "backbone", tmp_path / "backbone")
    edit(folder / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"})
    edit(
        folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"}, image_processor_type="Evil"
    )
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).touch()")
    with pytest.raises(LayerFusionError, match="trust_remote_code=True"):
        ViTForAttentiveLayerFusionClassification.from_backbone(folder, num_labels=2)
    edit(folder / "config.json", model_type="vit")
    assert ViTForAttentiveLayerFusionClassification.from_backbone(folder, num_labels=2).image_processor is None
    assert not (tmp_path / "sprung").exists()


def test_code_named_in_a_nested_config_is_left_alone(head, backbone, expected, nobody_answers):
    """As in the configs of models that transformers has learned since."""
    values = read(head / "config.json")
    nested = {**values["backbone_config"], "auto_map": {"AutoModel": "evil.Evil"}}
    edit(head / "config.json", reseal=True, backbone_config=nested)
    model = load(head, backbone=backbone)
    assert not hasattr(model.config.backbone_config, "auto_map")
    assert torch.equal(logits_of(model), expected)


def test_quantisation_that_would_calibrate(head):
    values = read(head / "config.json")
    nested = {**values["backbone_config"], "quantization_config": {"quant_method": "gptq", "dataset": "c4", "bits": 4}}
    edit(head / "config.json", reseal=True, backbone_config=nested)
    with pytest.raises(LayerFusionError, match="quantised by 'gptq': load it yourself and pass it as backbone="):
        load(head)


def test_settings_that_trainer_leaves_in_a_config(head, backbone):
    """Unknown fields are refused; those that transformers itself writes are known."""
    model = load(head, backbone=backbone)
    model.config.use_cache = False
    model.config.pad_token_id = 0
    model.save_pretrained(head)
    assert isinstance(open_config(str(head), {}), LayerFusionConfig)
    load(head, backbone=backbone)

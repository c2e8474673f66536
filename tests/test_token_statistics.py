"""Token statistics: their values, the file they are kept in, and the way they take with rows and batches."""

import errno
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, Value
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from hf_layerfusion import LayerFeatures, LayerFusionError, ViTForAttentiveLayerFusionClassification, extract_features
from hf_layerfusion.bank import TokenBank
from hf_layerfusion.cli.main import main
from hf_layerfusion.features import EpochViews, statistics, token_statistics
from hf_layerfusion.features.extract import _write_shard
from hf_layerfusion.features.manifest import STATISTICS_NAME, Manifest, own_file, record_file, shard_file
from hf_layerfusion.files import write_json
from hf_layerfusion.training import LayerFeatureCollator

BANK = [[layer, "block", pool] for layer in (1, 2, 3) for pool in ("cls", "mean")]
ROWS, SHARD_ROWS, TOKENS, WIDTH = 23, 10, len(BANK), 20


def reference(tokens):
    """Norm and population standard deviation, in float64."""
    values = tokens.to(torch.float64).numpy()
    spread = (values - values[..., :1]).std(axis=-1)  # of differences, since the mean of large numbers is rounded
    return torch.from_numpy(np.stack([np.linalg.norm(values, axis=-1), spread], axis=-1))


def bank_tokens(seed=0):
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def write_cache(folder, tokens=None, dtype="float16", num_views=1):
    """A finished cache of three shards, the last one smaller."""
    tokens = (bank_tokens() if tokens is None else tokens).to(getattr(torch, dtype))
    manifest = Manifest(
        bank=BANK,
        hidden_size=WIDTH,
        dtype=dtype,
        num_rows=len(tokens),
        rows_per_shard=SHARD_ROWS,
        label_names=None,
        ingredients={"dataset": {"label_column": "label"}},
        num_views=num_views,
    )
    for index, start in enumerate(range(0, len(tokens), SHARD_ROWS)):
        part = tokens[start : start + SHARD_ROWS]
        labels = np.arange(start, start + len(part)) % 2
        manifest.add(folder, _write_shard(folder, index, part, labels, Value("int64"), []))
    manifest.gather(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_cache(tmp_path_factory.mktemp("whole") / "train")


@pytest.fixture
def cache(whole, tmp_path):
    """A cache whose statistics were not taken yet."""
    return Path(shutil.copytree(whole, tmp_path / "train"))


@pytest.fixture
def taken(monkeypatch):
    """How often statistics are computed: the shapes of the tokens they are taken of."""
    shapes = []

    def note(tokens):
        shapes.append(tuple(tokens.shape))
        return token_statistics(tokens)

    monkeypatch.setattr(statistics, "token_statistics", note)
    return shapes


OF_ALL_SHARDS = [(SHARD_ROWS, TOKENS, WIDTH)] * 2 + [(ROWS - 2 * SHARD_ROWS, TOKENS, WIDTH)]


# ---- values ------------------------------------------------------------------------------------------------------


def integers(low, high):
    return torch.randint(low, high, (7, 4, 50), generator=torch.Generator().manual_seed(0))


def padded():
    tokens = torch.randn(7, 4, 50)
    tokens[:, 1, 30:] = 0
    tokens[:, 3, 1:] = 0
    return tokens


VALUES = {
    "normal": (torch.randn(7, 4, 384), 1e-6),
    "float16": (torch.randn(7, 4, 384).half(), 1e-6),
    "bfloat16": (torch.randn(7, 4, 384).bfloat16(), 1e-6),
    "float64": (torch.randn(7, 4, 384, dtype=torch.float64), 1e-14),
    "offset": (torch.randn(7, 4, 384) + 1e3, 1e-6),
    "huge offset": (torch.randn(7, 4, 384) + 1e6, 1e-6),
    "last digits of float32": (integers(0, 3).float() + 2**23, 1e-6),
    "last digits of float16": ((integers(0, 3) + 2045).half(), 1e-6),
    "last digits of float64": (integers(0, 3).double() + 2**52, 1e-14),
    "largest of float16": (integers(-3, 4).half() * 20000, 1e-6),
    "smallest of float16": (integers(-3, 4).half() * 2**-24, 1e-6),
    "one outlier": (torch.cat([torch.randn(7, 4, 383), torch.full((7, 4, 1), 3e4)], -1), 1e-6),
    "wide": (torch.randn(2, 3, 8192) + 1, 1e-6),
    "padded": (padded(), 1e-6),
    "zero": (torch.zeros(7, 4, 50), 0),
    "one token": (torch.randn(384), 1e-6),
    "width one": (torch.randn(7, 4, 1), 1e-6),
    "five axes": (torch.randn(2, 1, 3, 2, 50), 1e-6),
    "none": (torch.zeros(0, 4, 50), 0),
    "transposed": (torch.randn(50, 4, 7).transpose(0, 2), 1e-6),
}


@pytest.mark.parametrize("block", [statistics._BLOCK, 1000, 1])
@pytest.mark.parametrize(("tokens", "tolerance"), VALUES.values(), ids=VALUES)
def test_values(tokens, tolerance, block, monkeypatch):
    monkeypatch.setattr(statistics, "_BLOCK", block)
    before = tokens.clone()
    found = token_statistics(tokens)
    assert found.dtype == (torch.float64 if tokens.dtype == torch.float64 else torch.float32)
    assert found.shape == (*tokens.shape[:-1], 2)
    torch.testing.assert_close(found.double(), reference(tokens), rtol=tolerance, atol=0)
    assert torch.equal(tokens, before)


def test_equal_numbers_have_no_spread():
    tokens = torch.tensor([1234.567, -0.1, 1e30, 3.0]).repeat(384, 1).t()
    norm, spread = token_statistics(tokens[[0, 1, 3]]).unbind(-1)
    torch.testing.assert_close(norm, tokens[[0, 1, 3], 0].abs() * 384**0.5, rtol=1e-6, atol=0)
    assert (spread <= 1e-12 * norm).all()


def test_no_gradient():
    assert not token_statistics(torch.randn(3, 4, 5, requires_grad=True)).requires_grad


# ---- the file's life ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("offset", [0.0, 1500.0])
def test_they_are_taken_once_and_found_again(dtype, offset, taken, tmp_path):
    tokens = bank_tokens() + offset
    tokens[3, 2] = 0
    folder = write_cache(tmp_path / "cache", tokens, dtype)
    expected = reference(tokens.to(getattr(torch, dtype)))
    features = LayerFeatures.open(folder)
    assert not (folder / STATISTICS_NAME).exists()
    for _ in range(2):
        found = features.token_statistics()
        assert (found.dtype, found.shape) == (torch.float32, (ROWS, TOKENS, 2))
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert taken == OF_ALL_SHARDS
    written = (folder / STATISTICS_NAME).stat()
    assert written.st_mode == (folder / shard_file(0)).stat().st_mode  # whoever reads the shards reads this too
    for again in (LayerFeatures.open(folder), LayerFeatures.open(folder).select(pools=["cls"]).select_rows([4, 2])):
        again.with_statistics()
    assert torch.equal(LayerFeatures.open(folder).token_statistics(), features.token_statistics())
    assert taken == OF_ALL_SHARDS
    assert (folder / STATISTICS_NAME).stat().st_mtime_ns == written.st_mtime_ns
    assert not list(folder.glob("*.tmp"))


def test_the_first_use_may_be_of_a_selection(cache, taken):
    features = LayerFeatures.open(cache)
    some = features.select(layers=[2]).select_rows([20, 3])
    expected = reference(bank_tokens().half())[[20, 3]][:, 2:4]
    torch.testing.assert_close(some.token_statistics().double(), expected, rtol=1e-6, atol=0)
    assert load_file(cache / STATISTICS_NAME)["token_statistics"].shape == (ROWS, TOKENS, 2)
    assert features.token_statistics().shape == (ROWS, TOKENS, 2)
    assert taken == OF_ALL_SHARDS


def test_several_writers_at_once(cache):
    all_features = [LayerFeatures.open(cache) for _ in range(6)]
    found, gate = [], threading.Barrier(len(all_features))

    def use(features):
        gate.wait()
        found.append(features.token_statistics().clone())

    threads = [threading.Thread(target=use, args=(features,)) for features in all_features]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(all_features)
    assert all(torch.equal(one, found[0]) for one in found)
    assert torch.equal(load_file(cache / STATISTICS_NAME)["token_statistics"], found[0])
    assert not list(cache.glob("*.tmp"))


def rewrite(folder, values=None, name="token_statistics", extra=None):
    """The file with something else in it, and the rest as it was."""
    path = folder / STATISTICS_NAME
    with safe_open(path, framework="pt") as file:
        kept = file.metadata()
    values = load_file(path)["token_statistics"].clone() if values is None else values
    save_file({name: values, **(extra or {})}, path, metadata=kept)


def cut(folder, size):
    path = folder / STATISTICS_NAME
    path.write_bytes(path.read_bytes()[:size])


def take_of_another(folder):
    other = write_cache(folder.parent / "other", bank_tokens(seed=1))
    LayerFeatures.open(other).token_statistics()
    shutil.copy(other / STATISTICS_NAME, folder)


UNFIT = {
    "truncated": (lambda f: cut(f, -8), "cannot be read"),
    "empty": (lambda f: cut(f, 0), "cannot be read"),
    "no header": (lambda f: cut(f, 20), "cannot be read"),
    "noise": (lambda f: (f / STATISTICS_NAME).write_bytes(b"nothing of that kind" * 99), "cannot be read"),
    "longer": (
        lambda f: (f / STATISTICS_NAME).write_bytes((f / STATISTICS_NAME).read_bytes() + b"\0" * 8),
        "cannot be read",
    ),
    "of other shards": (take_of_another, "belong to other shards, or have another format"),
    "no metadata": (
        lambda f: save_file({"token_statistics": torch.zeros(ROWS, TOKENS, 2)}, f / STATISTICS_NAME),
        "belong to other shards, or have another format",
    ),
    "fewer rows": (lambda f: rewrite(f, torch.zeros(ROWS - 1, TOKENS, 2)), r"instead of F32 of shape \[23, 6, 2\]"),
    "flat": (lambda f: rewrite(f, torch.zeros(ROWS, TOKENS * 2)), r"instead of F32 of shape \[23, 6, 2\]"),
    "float64": (lambda f: rewrite(f, torch.zeros(ROWS, TOKENS, 2).double()), "instead of F32 of shape"),
    "float16": (lambda f: rewrite(f, torch.zeros(ROWS, TOKENS, 2).half()), "instead of F32 of shape"),
    "another name": (lambda f: rewrite(f, name="statistics"), "instead of F32 of shape"),
    "two tensors": (lambda f: rewrite(f, extra={"more": torch.zeros(1)}), "instead of F32 of shape"),
}


@pytest.mark.parametrize(("damage", "message"), UNFIT.values(), ids=UNFIT)
def test_a_file_that_does_not_fit_is_taken_again(cache, taken, caplog, damage, message):
    expected = LayerFeatures.open(cache).token_statistics().clone()
    damage(cache)
    with pytest.raises(LayerFusionError, match=message):
        statistics.read_statistics(cache, Manifest.load(cache))
    taken.clear()
    caplog.clear()
    assert torch.equal(LayerFeatures.open(cache).token_statistics(), expected)
    assert taken == OF_ALL_SHARDS
    (warning,) = (record.getMessage() for record in caplog.records)
    assert warning.startswith(f"the token statistics {cache / STATISTICS_NAME} ")
    assert warning.endswith(": they are taken again")
    assert torch.equal(statistics.read_statistics(cache, Manifest.load(cache)), expected)
    caplog.clear()
    assert torch.equal(LayerFeatures.open(cache).token_statistics(), expected)
    assert not caplog.records


def test_a_file_of_another_format_does_not_fit(cache, monkeypatch):
    LayerFeatures.open(cache).token_statistics()
    monkeypatch.setattr(statistics, "FORMAT_VERSION", 2)
    with pytest.raises(LayerFusionError, match="belong to other shards, or have another format"):
        statistics.read_statistics(cache, Manifest.load(cache))


def test_a_shard_that_changed_makes_them_unfit(cache, caplog):
    LayerFeatures.open(cache).token_statistics()
    manifest, tokens = Manifest.load(cache), bank_tokens(seed=1)[SHARD_ROWS : 2 * SHARD_ROWS].half()
    shard = _write_shard(cache, 1, tokens, np.zeros(SHARD_ROWS, np.int64), Value("int64"), [])
    manifest.shards[1] = shard
    manifest.save(cache)
    found = LayerFeatures.open(cache, verify=True).token_statistics()[SHARD_ROWS : 2 * SHARD_ROWS]
    assert "belong to other shards" in caplog.text
    torch.testing.assert_close(found.double(), reference(tokens), rtol=1e-6, atol=0)


def test_without_a_folder_to_write_to_they_stay_in_memory(cache, taken, monkeypatch, caplog):
    def fill_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    expected = reference(bank_tokens().half())
    for hinder in (lambda: monkeypatch.setattr(os, "fsync", fill_disk), lambda: shutil.rmtree(cache)):
        features = LayerFeatures.open(cache)
        before = sorted(cache.iterdir())
        hinder()
        for view in (features, features.with_statistics(), features.select_rows(range(ROWS))):
            torch.testing.assert_close(view.token_statistics().double(), expected, rtol=1e-6, atol=0)
        assert taken == OF_ALL_SHARDS
        taken.clear()
        assert not cache.exists() or sorted(cache.iterdir()) == before
    assert not caplog.records


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is read-only to this user")
def test_a_read_only_folder(cache, taken):
    cache.chmod(0o500)
    try:
        found = LayerFeatures.open(cache).token_statistics()
    finally:
        cache.chmod(0o700)
    torch.testing.assert_close(found.double(), reference(bank_tokens().half()), rtol=1e-6, atol=0)
    assert not list(cache.glob("*safetensors*"))


def test_features_of_a_dataset_keep_theirs_in_memory(cache, taken):
    features = LayerFeatures.open(cache)
    for view, rows in ((features.dataset.select([7, 1]), [7, 1]), (features.dataset, list(range(ROWS)))):
        for back in (LayerFeatures.from_dataset(view), LayerFeatures.from_dataset(view, like=features)):
            expected = reference(bank_tokens().half()[rows])
            torch.testing.assert_close(back.token_statistics().double(), expected, rtol=1e-6, atol=0)
    assert not (cache / STATISTICS_NAME).exists()
    assert len(taken) == 2 * (1 + 3)


def pictures(rows=5):
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(rows)]
    return Dataset.from_dict({"image": images, "label": [0, 1, 0, 1, 0]}).cast_column("image", Image())


def test_extraction_reuses_and_replaces_them(make_vit, tmp_path):
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        make_vit(), num_labels=2, image_processor=ViTImageProcessorPil(size={"height": 16, "width": 16})
    )
    folder, images = tmp_path / "cache", pictures()

    def extract(**options):
        return extract_features(model, images, folder, rows_per_shard=2, progress=False, **options)

    features = extract()
    assert not (folder / STATISTICS_NAME).exists()
    features.token_statistics()
    kept = (folder / STATISTICS_NAME).read_bytes()
    (folder / f"{STATISTICS_NAME}.99.tmp").write_text("half")
    (folder / shard_file(1)).unlink()
    assert torch.equal(extract().token_statistics(), features.token_statistics())  # the same bytes again
    assert (folder / STATISTICS_NAME).read_bytes() == kept
    other = extract(dtype="float32", overwrite=True)
    assert sorted(file.name for file in folder.iterdir()) == [*map(shard_file, range(3)), "features.json"]
    tokens = other.tensors()["layer_features"]
    torch.testing.assert_close(other.token_statistics().double(), reference(tokens), rtol=1e-6, atol=0)


def test_overwriting_refuses_a_linked_manifest(make_vit, tmp_path):
    model = ViTForAttentiveLayerFusionClassification.from_backbone(
        make_vit(), num_labels=2, image_processor=ViTImageProcessorPil(size={"height": 16, "width": 16})
    )
    images = pictures()
    extract_features(model, images, tmp_path / "cache", progress=False)
    manifest = (tmp_path / "cache" / "features.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "cache" / "features.json").symlink_to(manifest)
    before = {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    with pytest.raises(
        LayerFusionError, match=r"features\.json is a link, which is not replaced: give another folder"
    ):
        extract_features(model, images, tmp_path / "cache", dtype="float32", overwrite=True, progress=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before


def test_gathering_records_leaves_statistics_that_another_process_writes(cache):
    manifest = Manifest.load(cache)
    write_json(cache / record_file(0), manifest.shards[0].__dict__)
    staged = [cache / f"{name}.7.tmp" for name in (STATISTICS_NAME, shard_file(0), "features.json")]
    for file in staged:
        file.write_text("half")
    manifest.gather(cache)
    assert [file.exists() for file in staged] == [True, False, False]


def test_to_the_hub_and_back(cache, taken, hub, tmp_path):
    features = LayerFeatures.open(cache)
    features.push_to_hub(f"me/without-{tmp_path.name}")
    assert not (LayerFeatures.open(f"me/without-{tmp_path.name}").folder / STATISTICS_NAME).exists()
    expected = features.token_statistics()
    features.push_to_hub(f"me/with-{tmp_path.name}")
    taken.clear()
    back = LayerFeatures.open(f"me/with-{tmp_path.name}")
    assert torch.equal(back.token_statistics(), expected)
    assert not taken


# ---- names -------------------------------------------------------------------------------------------------------

NAMES = {
    "features.json": ("features.json", None, False),
    "features.json.12.tmp": ("features.json", None, True),
    "features-00012.arrow": ("features-00012.arrow", 12, False),
    "features-00012.json": ("features-00012.json", 12, False),
    "features-123456.arrow.3.tmp": ("features-123456.arrow", 123456, True),
    STATISTICS_NAME: (STATISTICS_NAME, None, False),
    f"{STATISTICS_NAME}.18446744073709551615.tmp": (STATISTICS_NAME, None, True),
    **dict.fromkeys(
        (
            "features.arrow",
            "features.safetensors",
            "features-000012.arrow",
            "features-12.arrow",
            "features-٠٠٠٠٧.arrow",
            "features-00012.arrow.tmp",
            "features-statistics.arrow",
            "features-statistics.json",
            f"{STATISTICS_NAME}.tmp",
            f"{STATISTICS_NAME}.1.tmp.2.tmp",
            f"my-{STATISTICS_NAME}",
            "thesis.txt",
        )
    ),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items(), ids=NAMES)
def test_which_names_are_a_cache_s_own(name, expected, tmp_path):
    file = tmp_path / name
    assert own_file(file) is None  # not there
    file.write_text("x")
    own = own_file(file)
    assert (None if own is None else (own.name, own.index, own.is_staged)) == expected
    file.rename(tmp_path / "aside")
    file.symlink_to(tmp_path / "aside")
    assert own_file(file) is None
    file.unlink()
    file.mkdir()
    assert own_file(file) is None


# ---- layerfusion cache -------------------------------------------------------------------------------------------


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        capsys.readouterr()
        status = main(["cache", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def change(folder, row, token, which, factor):
    values = load_file(folder / STATISTICS_NAME)["token_statistics"].clone()
    values[row, token, which] *= factor
    rewrite(folder, values)


def test_info(cli, cache):
    assert "\ntoken statistics: not taken yet\n" in cli("info", cache)[1]
    LayerFeatures.open(cache).token_statistics()
    size = (cache / STATISTICS_NAME).stat().st_size
    assert f"\ntoken statistics: {size:,} bytes\n" in cli("info", cache)[1]
    take_of_another(cache)
    status, printed, _ = cli("info", cache)
    assert status == 0
    assert f"\ntoken statistics: the token statistics {cache / STATISTICS_NAME} belong to other shards" in printed


def test_statistics_that_fit(cli, cache):
    features = LayerFeatures.open(cache)
    features.token_statistics()
    change(cache, 3, 2, 0, 1 + 1e-6)  # another machine's rounding
    before = {file.name: file.read_bytes() for file in cache.iterdir()}
    assert cli("verify", cache) == (0, f"{cache}: complete, 3 of 3 shards, 23 of 23 rows, 0 damaged\n", "")
    for options in ((), ("--damaged",)):
        assert "removed 0 files" in cli("prune", *options, cache)[1]
    assert {file.name: file.read_bytes() for file in cache.iterdir()} == before


WRONG_VALUES = {
    "norm": (lambda f: change(f, 0, 0, 0, 1.001), 0),
    "deviation": (lambda f: change(f, 22, 5, 1, 0.999), 2),
    "not a number": (lambda f: change(f, 10, 3, 1, float("nan")), 1),
    "rows in another order": (
        lambda f: rewrite(f, load_file(f / STATISTICS_NAME)["token_statistics"].flip(0).contiguous()),
        0,
    ),
}


@pytest.mark.parametrize(("damage", "shard"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_verify_compares_values(cli, cache, damage, shard):
    LayerFeatures.open(cache).token_statistics()
    damage(cache)
    status, printed, error = cli("verify", cache)
    path = cache / STATISTICS_NAME
    assert status == 1
    assert printed.splitlines() == [
        f"damaged: the token statistics {path} are not those of the tokens in {shard_file(shard)}",
        f"{cache}: complete, 3 of 3 shards, 23 of 23 rows, 1 damaged",
    ]
    assert error.startswith(f"layerfusion cache: token statistics that do not fit in {cache}: remove them with `layer")
    assert len(error.splitlines()) == 1
    assert "removed 0 files" in cli("prune", cache)[1]  # which reads no tokens
    reason = f"{path}: token statistics that do not fit the shards, {path.stat().st_size:,} bytes\n"
    assert f"would remove {reason}" in cli("prune", "--damaged", "--dry_run", cache)[1]
    assert path.exists()
    assert f"removed {reason}" in cli("prune", "--damaged", cache)[1]
    assert not path.exists()
    assert cli("verify", cache)[0] == 0


@pytest.mark.parametrize(("damage", "message"), UNFIT.values(), ids=UNFIT)
def test_a_file_of_something_else_is_named_and_pruned(cli, cache, damage, message):
    LayerFeatures.open(cache).token_statistics()
    damage(cache)
    status, printed, _ = cli("verify", cache)
    assert status == 1
    assert printed.startswith(f"damaged: the token statistics {cache / STATISTICS_NAME} ")
    assert printed.endswith(", 1 damaged\n")
    assert "removed 1 files" in cli("prune", cache)[1]
    assert cli("verify", cache)[0] == 0


def test_damaged_shards_and_their_statistics(cli, cache):
    LayerFeatures.open(cache).token_statistics()
    shard = cache / shard_file(1)
    shard.write_bytes(shard.read_bytes()[:-8])
    status, printed, error = cli("verify", cache)
    assert (status, printed.count("damaged: ")) == (1, 1)  # those of the other shards are as they were
    assert error.startswith(f"layerfusion cache: damaged shards in {cache}: ")
    change(cache, 0, 0, 0, 2)
    status, printed, error = cli("verify", cache)
    assert (status, printed.count("damaged: ")) == (1, 2)
    assert "damaged shards in" in error
    assert "token statistics that do not fit in" in error
    assert "removed 2 files" in cli("prune", "--damaged", cache)[1]
    assert sorted(file.name for file in cache.iterdir()) == [shard_file(0), shard_file(2), "features.json"]


def test_prune_removes_half_written_statistics(cli, cache):
    old, young = (cache / f"{STATISTICS_NAME}.{number}.tmp" for number in (1, 2))
    for file in (old, young):
        file.write_text("half")
    os.utime(old, (time.time() - 3600,) * 2)
    printed = cli("prune", cache)[1]
    assert f"removed {old}: left by a write that did not finish, 4 bytes\n" in printed
    assert f"kept {young}: left by a write that did not finish, but younger than 60 seconds\n" in printed
    assert (old.exists(), young.exists()) == (False, True)


# ---- with rows and batches ---------------------------------------------------------------------------------------

REVERSED = TokenBank.from_list(BANK[::-1])
SELECTIONS = {
    "all": lambda features: features,
    "select": lambda features: features.select(layers=[3, 1], pools=["mean"]),
    "select_bank": lambda features: features.select_bank(REVERSED),
    "select_rows": lambda features: features.select_rows([21, 3, 3, 10]),
    "view": lambda features: features.view(1),
    "to": lambda features: features.to("cpu"),
    "split": lambda features: features.train_test_split(6)[1],
    "chain": lambda features: features.view(0).to("cpu").select_rows(range(9, 1, -1)).select(pools=["cls"]),
    "epochs": lambda features: EpochViews(features).views[1],
}


@pytest.fixture(scope="module")
def of_two_views(tmp_path_factory):
    folder = write_cache(tmp_path_factory.mktemp("views") / "train", bank_tokens()[:22], num_views=2)
    return LayerFeatures.open(folder)


@pytest.mark.parametrize("select", SELECTIONS.values(), ids=SELECTIONS)
def test_selections_keep_them(of_two_views, taken, select):
    plain = select(of_two_views)
    tokens = plain.tensors()["layer_features"]
    expected = token_statistics(tokens)
    with_them = of_two_views.with_statistics()
    taken.clear()
    for features in (select(with_them), plain.with_statistics(), select(with_them).with_statistics()):
        assert torch.equal(features.token_statistics(), expected)
        assert torch.equal(features[1]["token_statistics"], expected[1])
        assert torch.equal(features.tensors()["token_statistics"], expected)
        rows = features.__getitems__([2, 0])
        assert [set(row) for row in rows] == [{"layer_features", "token_statistics", "labels"}] * 2
        assert torch.equal(torch.stack([row["token_statistics"] for row in rows]), expected[[2, 0]])
        for options in ({}, {"shuffle": True}, {"shuffle": "chunks", "seed": 3}, {"device": "cpu"}):
            for batch in features.batches(4, **options):
                assert torch.equal(batch["token_statistics"], token_statistics(batch["layer_features"]))
    assert not taken
    assert torch.equal(plain.token_statistics(), expected)
    for batch in (plain[0], plain.tensors(), next(plain.batches(2))):
        assert set(batch) == {"layer_features", "labels"}


def test_they_follow_to_a_device(cache, taken):
    features = LayerFeatures.open(cache)
    # "meta" holds no values, but says where they would be; they are taken of the files all the same.
    moved = features.to("meta").with_statistics().select(pools=["cls"])
    batch = moved.tensors()
    assert {name: value.device.type for name, value in batch.items()} == {
        "layer_features": "meta",
        "token_statistics": "meta",
        "labels": "cpu",
    }
    assert batch["token_statistics"].shape == (ROWS, TOKENS // 2, 2)
    expected = reference(bank_tokens().half())
    torch.testing.assert_close(features.token_statistics().double(), expected, rtol=1e-6, atol=0)
    assert taken == OF_ALL_SHARDS


# ---- the collator ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["gathered", "rows", "lists"])
def test_the_collator_passes_them_on(cache, path):
    features = LayerFeatures.open(cache).with_statistics().select(pools=["mean"])
    collate = LayerFeatureCollator(3, 2)
    index = [4, 17, 0]
    rows = features.__getitems__(index)
    if path == "rows":
        rows = [features[i] for i in index]
    elif path == "lists":
        rows = [{name: torch.as_tensor(value).tolist() for name, value in row.items()} for row in rows]
    batch = collate(rows)
    assert set(batch) == {"layer_features", "token_statistics", "labels"}
    assert batch["token_statistics"].dtype == torch.float32
    assert torch.equal(batch["token_statistics"], features.token_statistics()[index])
    assert torch.equal(batch["layer_features"].half(), features.tensors()["layer_features"][index])
    assert batch["labels"].tolist() == features.labels[index].tolist()
    plain = LayerFeatures.open(cache).select(pools=["mean"])
    for rows in (plain.__getitems__(index), [plain[i] for i in index]):
        assert set(collate(rows)) == {"layer_features", "labels"}


def test_the_collator_refuses_what_does_not_belong_together(cache):
    plain = LayerFeatures.open(cache)
    features = plain.with_statistics()
    collate = LayerFeatureCollator(TOKENS)
    for rows in ([features[0], plain[1]], [plain[0], features[1]]):
        with pytest.raises(
            LayerFusionError, match=r"some rows .* have 'token_statistics' .*with_statistics\(\) on all"
        ):
            collate(rows)
    gathered = features.__getitems__([0, 1])
    gathered.batch["token_statistics"] = gathered.batch["token_statistics"][:, :2]
    for rows in (gathered, list(gathered)):
        with pytest.raises(
            LayerFusionError, match=r"token_statistics of shape \(2, 2\), .* of 6 tokens: take them with"
        ):
            collate(rows)

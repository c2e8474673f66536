"""Heads and backbones that come from a Hub, over HTTP: pins, caches, and what is said when something is not there."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hub_helpers import assert_same_logits, build, load, logits_of, repo_of, train_a_little
from huggingface_hub import HfApi
from PIL import Image
from transformers import AutoModel, pipeline

from hf_layerfusion import LayerFusionConfig, LayerFusionError

# Prints the logits of the head named on the command line.
LOAD_AND_RUN = """
import json, sys, torch
from hf_layerfusion import ViTForAttentiveLayerFusionClassification
model = ViTForAttentiveLayerFusionClassification.from_pretrained(sys.argv[1])
pixels = torch.linspace(-2, 2, 2 * 3 * 16 * 16).view(2, 3, 16, 16).sin()
print(json.dumps(model(pixels).logits.tolist()))
"""


@pytest.fixture
def backbone(hub, save_backbone, tmp_path):
    """Id and commit of a backbone on the Hub, new for every test."""
    repo_id = f"me/backbone-{tmp_path.name}"
    return repo_id, hub.upload_folder(save_backbone(tmp_path / "backbone"), repo_id)


@pytest.fixture
def model(backbone):
    return build(backbone[0])


@pytest.fixture
def head(model, tmp_path):
    """Id of a head on the Hub, new for every test."""
    repo_id = f"me/head-{tmp_path.name}"
    model.push_to_hub(repo_id)
    return repo_id


def run_elsewhere(script, *arguments, **environment):
    """Run a script in a fresh process, with the environment of this one."""
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
    )


# ---- backbones -----------------------------------------------------------------------------------------------------


def test_backbone_is_pinned_to_its_commit(backbone):
    repo_id, commit = backbone
    model = build(repo_id)
    assert model.config.backbone_name_or_path == repo_id
    assert model.config.backbone_revision == commit
    assert model.image_processor.size["height"] == 16


def test_revision_of_a_backbone(hub, backbone, save_backbone, tmp_path):
    repo_id, first = backbone
    api = HfApi()
    api.create_tag(repo_id, tag="v1")
    api.create_branch(repo_id, branch="next")
    second = hub.upload_folder(save_backbone(tmp_path / "other", seed=1), repo_id, revision="next")
    assert first != second
    models = {revision: build(repo_id, revision=revision) for revision in ("v1", "next", first, second)}
    pins = {revision: model.config.backbone_revision for revision, model in models.items()}
    assert pins == {"v1": first, "next": second, first: first, second: second}
    digests = {revision: model.config.backbone_fingerprint["digest"] for revision, model in models.items()}
    assert digests["v1"] == digests[first] != digests["next"] == digests[second]


def test_instance_from_the_hub_names_where_it_came_from(backbone):
    repo_id, commit = backbone
    model = build(AutoModel.from_pretrained(repo_id), revision=commit)
    assert (model.config.backbone_name_or_path, model.config.backbone_revision) == (repo_id, commit)


# ---- load ----------------------------------------------------------------------------------------------------------


def test_head_comes_back(head, model, backbone):
    loaded = load(head)
    assert_same_logits(loaded, model)
    assert loaded.config.backbone_revision == backbone[1]
    assert loaded.image_processor.to_dict() == model.image_processor.to_dict()


def test_revision_of_a_head(hub, head, model):
    old = repo_of(hub, head).refs["refs/heads/main"]
    expected = logits_of(model)
    HfApi().create_tag(head, tag="v1")
    with torch.no_grad():
        model.head.classifier.bias += 1
    model.push_to_hub(head)
    for revision in ("v1", old):
        torch.testing.assert_close(logits_of(load(head, revision=revision)), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits_of(load(head)), expected + 1, atol=1e-6, rtol=0)


def test_head_in_a_subfolder(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "repo" / "heads" / "one")
    repo_id = f"me/{tmp_path.name}"
    hub.upload_folder(tmp_path / "repo", repo_id)
    assert_same_logits(load(repo_id, subfolder="heads/one"), model)


def test_backbone_repository_moves_on(hub, backbone, head, model, save_backbone, tmp_path):
    repo_id, pinned = backbone
    hub.upload_folder(save_backbone(tmp_path / "new", seed=1), repo_id)
    assert repo_of(hub, repo_id).refs["refs/heads/main"] != pinned
    assert_same_logits(load(head), model)
    with pytest.raises(LayerFusionError, match=r"parts have other weights \(embeddings, layers\.0"):
        load(head, backbone=repo_id)


def test_pinned_weights_were_replaced(hub, backbone, model, save_backbone, tmp_path):
    """A pin that names other weights, such as a branch that moved or a rewritten history."""
    repo_id, _ = backbone
    other = hub.upload_folder(save_backbone(tmp_path / "new", seed=1), repo_id)
    model.config.backbone_revision = other
    model.push_to_hub(f"me/{tmp_path.name}")
    with pytest.raises(LayerFusionError) as raised:
        load(f"me/{tmp_path.name}")
    assert str(raised.value).startswith(
        f"this is not the backbone that the head was trained on ({repo_id}, revision {other}): "
        "5 of 6 parts have other weights (embeddings, layers.0, layers.1 and 2 more)"
    )


def test_pipeline_by_name(head, model):
    image = Image.linear_gradient("L")
    with torch.no_grad():
        expected = model(**model.image_processor(image.convert("RGB"), return_tensors="pt")).logits[0].softmax(-1)
    found = {entry["label"]: entry["score"] for entry in pipeline("image-classification", model=head)(image)}
    scores = torch.tensor([found[f"LABEL_{index}"] for index in range(3)])
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)


def test_fresh_process_with_and_without_the_hub(hub, head, model, tmp_path):
    """The first process fetches head and backbone into an empty cache; the second finds no Hub and needs none."""
    cache = {"HF_HOME": str(tmp_path / "hf-home")}
    # Nothing listens on the discard port.
    without_hub = {**cache, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    for environment, asks_the_hub in ((cache, True), (without_hub, False)):
        before = len(hub.requests)
        done = run_elsewhere(LOAD_AND_RUN, head, **environment)
        assert done.returncode == 0, done.stderr
        assert (len(hub.requests) > before) is asks_the_hub
        torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), logits_of(model), atol=1e-6, rtol=0)


def test_local_files_only(hub, backbone, head, model, tmp_path):
    """Reaches the backbone, too, and a cache that does not hold it is not filled."""
    elsewhere = {"cache_dir": str(tmp_path / "cache")}
    with pytest.raises(OSError, match="cached"):
        load(head, **elsewhere, local_files_only=True)
    load(head, **elsewhere)
    before = len(hub.requests)
    assert_same_logits(load(head, **elsewhere, local_files_only=True), model)
    assert len(hub.requests) == before


def test_token_reaches_the_backbone(hub, backbone, head, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(hub, "token", "hf_another_token")
    assert load(head, token="hf_another_token").backbone is not None
    with pytest.raises(OSError):
        load(head, token="hf_wrong", force_download=True)


def test_private_head_on_a_private_backbone(hub, backbone, head, model, tmp_path):
    """One token opens both, and nobody else sees either."""
    for repo_id in (head, backbone[0]):
        HfApi().update_repo_settings(repo_id, private=True)
    cache = {"cache_dir": str(tmp_path / "cache")}
    for token in ("hf_token_of_you", False):
        with pytest.raises(OSError, match="not a valid model identifier"):
            load(head, **cache, token=token)
    assert_same_logits(load(head, **cache, token=hub.token), model)


def test_update_is_seen(hub, head, model):
    """`main` is looked up again by every load."""
    assert_same_logits(load(head), model)
    train_a_little(model)
    model.push_to_hub(head)
    assert_same_logits(load(head), model)


@pytest.mark.parametrize("name", ["head", "backbone"])
def test_interrupted_download(hub, backbone, head, model, tmp_path, monkeypatch, name):
    """A part is never taken for the whole; some clients go on by themselves, others want to be asked again."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    weights = f"/lfs/models/{head if name == 'head' else backbone[0]}/"
    cache = {"cache_dir": str(tmp_path / "cache")}
    with hub.failing("GET", weights, after_bytes=1000, times=2) as failure, suppress(Exception):
        load(head, **cache)
    assert failure.count > 0
    assert_same_logits(load(head, **cache), model)


def test_hub_that_fails(hub, backbone, head, model, tmp_path, monkeypatch):
    """While it does, what is in the cache will do; what is not there cannot be had."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    cached, empty = ({"cache_dir": str(tmp_path / name)} for name in ("cached", "empty"))
    load(head, **cached)
    with hub.failing("HEAD", "/resolve/", status=503), hub.failing("GET", ".", status=503):
        assert_same_logits(load(head, **cached), model)
        with pytest.raises(OSError):
            load(head, **empty)
    assert_same_logits(load(head, **empty), model)


# ---- what is not there ---------------------------------------------------------------------------------------------


def test_missing_head():
    with pytest.raises(OSError, match="me/no-such-head is not a local folder and is not a valid model identifier"):
        load("me/no-such-head")


def test_missing_backbone():
    with pytest.raises(LayerFusionError) as raised:
        build("me/no-such-backbone")
    assert "backbone 'me/no-such-backbone' is neither a folder nor a Hub model" in str(raised.value)


def test_missing_revision(backbone, head):
    with pytest.raises(LayerFusionError, match="no-such-tag"):
        build(backbone[0], revision="no-such-tag")
    with pytest.raises(OSError, match="no-such-tag"):
        load(head, revision="no-such-tag")


def test_backbone_of_a_head_is_gone(hub, backbone, head):
    del hub.repos["models", backbone[0]]
    with pytest.raises(LayerFusionError) as raised:
        load(head, force_download=True)
    assert f"backbone {backbone[0]!r} is neither a folder nor a Hub model" in str(raised.value)


def test_wrong_token(backbone, head, tmp_path):
    wrong = {"token": "hf_wrong", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(LayerFusionError, match=r"401|credentials"):
        build(backbone[0], **wrong)
    with pytest.raises(OSError, match=r"401|credentials"):
        load(head, **wrong)


def test_config_alone(head, backbone):
    """What a head is can be read without its weights and without its backbone."""
    config = LayerFusionConfig.from_pretrained(head)
    assert (config.backbone_name_or_path, config.backbone_revision) == backbone
    assert config.token_names[-1] == "layer 4 · block · mean"

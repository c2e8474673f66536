"""Heads on their way to a Hub, over HTTP: what arrives, what is refused, and what is left of an upload that fails."""

import json
import re
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from datasets import ClassLabel, Dataset, Features, Image
from hub_helpers import FILES, assert_same_logits, build, load, logits_of, repo_of, train_a_little
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download
from picture_helpers import CLASSES, picture, save_tiny_backbone
from transformers import AutoModel, Trainer, TrainingArguments

from hf_layerfusion import LayerFusionError, extract_features
from hf_layerfusion.cli.main import main
from hf_layerfusion.hub.push import push_folder
from hf_layerfusion.training import ImageCollator, build_trainer

YOUR_TOKEN = "hf_token_of_you"


@pytest.fixture(scope="module")
def backbone(hub, tmp_path_factory):
    """Folder, id and commit of a backbone that is on the Hub, too."""
    folder = save_tiny_backbone(tmp_path_factory.mktemp("backbone"))
    return folder, "me/backbone-of-pushed-heads", hub.upload_folder(folder, "me/backbone-of-pushed-heads")


@pytest.fixture(scope="module")
def shared_model(backbone):
    return build(backbone[1])


@pytest.fixture
def model(shared_model):
    """A head that no other test has pushed."""
    train_a_little(shared_model)
    return shared_model


@pytest.fixture
def repo_id(request):
    """A name for one test."""
    return "me/" + "-".join(re.findall("[a-z0-9]+", request.node.name))


@pytest.fixture
def quick_retries(monkeypatch):
    """The client tries again as often as ever, without the seconds in between."""
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.fixture(params=["lfs", "xet"])
def road(request, hub, tmp_path, monkeypatch):
    """How the weights travel. With hf_xet installed, users take Xet."""
    if request.param == "xet":
        pytest.importorskip("hf_xet", reason="the Xet road needs hf_xet")
        (tmp_path / "xet").mkdir()
        monkeypatch.setattr(hub, "xet_folder", tmp_path / "xet")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    return request.param


def assert_pushed(hub, model, repo_id, revision="main"):
    """The weights on the Hub are those of this head, bit for bit."""
    found = safetensors.torch.load(repo_of(hub, repo_id).at(revision).tree["model.safetensors"].data)
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_names_no_folder(hub, folder, repo_id, revision="main"):
    """A path of this machine tells others nothing, or too much."""
    for path, file in repo_of(hub, repo_id).at(revision).tree.items():
        assert str(folder).encode() not in file.data, f"{path} names {folder}"


def history(hub, repo_id, revision="main"):
    """Titles of the commits, the newest first, without the one that made the repository."""
    return [commit.title for commit in HfApi().list_repo_commits(repo_id, revision=revision)][:-1]


# ---- what arrives --------------------------------------------------------------------------------------------------


def test_push_is_one_commit(hub, road, backbone, model, repo_id, tmp_path):
    before = len(hub.requests)
    url = model.push_to_hub(repo_id, commit_message="First head")
    _, commit = repo_of(hub, repo_id).commits.values()
    assert url == f"{hub.url}/{repo_id}/commit/{commit.sha}"
    assert (commit.title, commit.author) == ("First head", "me")
    assert commit.tree.keys() >= FILES
    assert {Path(path).suffix for path in commit.tree} <= {".json", ".md", ".png", ".safetensors"}
    weights = commit.tree["model.safetensors"]
    assert b"backbone." not in weights.data
    config = json.loads(commit.tree["config.json"].data)
    assert (config["backbone_name_or_path"], config["backbone_revision"]) == backbone[1:]
    puts = [path for method, path in hub.requests[before:] if method == "PUT"]
    assert (weights.lfs, bool(weights.xet_hash), len(puts)) == (True, road == "xet", 0 if road == "xet" else 1)
    assert_same_logits(load(repo_id, cache_dir=tmp_path / "cache"), model)


def test_pushed_card(backbone, model, repo_id):
    model.push_to_hub(repo_id)
    card = ModelCard.load(repo_id)
    assert card.data.base_model == backbone[1]
    assert card.data.library_name == "hf_layerfusion"
    assert backbone[2] in card.text, "the revision of the backbone"
    assert f'model="{repo_id}"' in card.text, "the snippet names this repository"


def test_name_without_a_user(hub, model, repo_id):
    model.push_to_hub(repo_id.removeprefix("me/"))
    assert f'model="{repo_id}"' in ModelCard.load(repo_id).text


def test_second_push_is_a_second_commit(hub, road, model, repo_id):
    model.push_to_hub(repo_id, commit_message="one")
    first, expected = repo_of(hub, repo_id).refs["refs/heads/main"], logits_of(model)
    train_a_little(model)
    model.push_to_hub(repo_id, commit_message="two")
    assert history(hub, repo_id) == ["two", "one"]
    assert_pushed(hub, model, repo_id)
    assert_same_logits(load(repo_id, revision=first), expected)


def test_push_of_what_is_there_is_no_commit(hub, road, model, repo_id):
    url = model.push_to_hub(repo_id)
    assert model.push_to_hub(repo_id, commit_message="again") == url
    assert history(hub, repo_id) == ["Upload head"]


def test_push_with_backbone(model, repo_id, backbone):
    model.push_to_hub(repo_id, include_backbone=True)
    weights = safetensors.torch.load_file(hf_hub_download(repo_id, "model.safetensors"))
    assert weights.keys() == model.state_dict().keys()


def test_save_pretrained_pushes_as_asked(hub, model, repo_id, tmp_path):
    model.save_pretrained(tmp_path / "head", push_to_hub=True, repo_id=repo_id, commit_message="Saved and pushed")
    _, commit = repo_of(hub, repo_id).commits.values()
    assert {path.name for path in (tmp_path / "head").iterdir()} >= FILES
    assert commit.title == "Saved and pushed"
    assert_pushed(hub, model, repo_id)


# ---- branches and pull requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("branch", ["next", "trials/seed-1"])
def test_branch_is_created(hub, model, repo_id, branch):
    model.push_to_hub(repo_id)
    for round_number in (1, 2):
        train_a_little(model)
        model.push_to_hub(repo_id, revision=branch, commit_message=f"round {round_number}")
    assert history(hub, repo_id, branch) == ["round 2", "round 1", "Upload head"]
    assert history(hub, repo_id) == ["Upload head"]
    assert_same_logits(load(repo_id, revision=branch), model)


def test_branch_of_a_new_repository(hub, model, repo_id):
    model.push_to_hub(repo_id, revision="next")
    assert repo_of(hub, repo_id).at("main").tree == {}
    assert_pushed(hub, model, repo_id, "next")


@pytest.mark.parametrize("revision", ["v1", "commit"])
def test_only_branches_grow(hub, model, repo_id, revision):
    """A tag or a commit is a fixed point."""
    model.push_to_hub(repo_id)
    HfApi().create_tag(repo_id, tag="v1")
    commit = repo_of(hub, repo_id).refs["refs/heads/main"]
    train_a_little(model)
    with pytest.raises(LayerFusionError, match="not a branch"):
        model.push_to_hub(repo_id, revision=commit if revision == "commit" else revision)
    assert repo_of(hub, repo_id).refs == {"refs/heads/main": commit, "refs/tags/v1": commit}


def test_pull_request(hub, road, model, repo_id):
    """The change waits on its own ref, and can be tried from there."""
    model.push_to_hub(repo_id)
    before = repo_of(hub, repo_id).refs["refs/heads/main"]
    train_a_little(model)
    url = model.push_to_hub(repo_id, create_pr=True, commit_message="A better head")
    assert url == f"{hub.url}/{repo_id}/discussions/1"
    (opened,) = HfApi().get_repo_discussions(repo_id)
    assert (opened.title, opened.author, opened.is_pull_request) == ("A better head", "me", True)
    assert repo_of(hub, repo_id).refs["refs/heads/main"] == before
    assert_same_logits(load(repo_id, revision="refs/pr/1"), model)

    train_a_little(model)
    model.push_to_hub(repo_id, revision="refs/pr/1", commit_message="Better still")
    assert history(hub, repo_id, "refs/pr/1") == ["Better still", "A better head", "Upload head"]
    assert_pushed(hub, model, repo_id, "refs/pr/1")


def test_pull_request_to_a_branch(hub, model, repo_id):
    """The client has none of those."""
    with pytest.raises(LayerFusionError, match=r"create_pr .*main"):
        model.push_to_hub(repo_id, create_pr=True, revision="next")
    assert ("models", repo_id) not in hub.repos


def test_pull_request_by_somebody_else(hub, road, model, repo_id):
    model.push_to_hub(repo_id)
    train_a_little(model)
    url = model.push_to_hub(repo_id, create_pr=True, token=YOUR_TOKEN)
    assert url == f"{hub.url}/{repo_id}/discussions/1"
    assert repo_of(hub, repo_id).at("refs/pr/1").author == "you"
    assert history(hub, repo_id) == ["Upload head"]


# ---- private -------------------------------------------------------------------------------------------------------


def test_private_head(hub, road, model, repo_id, tmp_path):
    model.push_to_hub(repo_id, private=True)
    for token in (YOUR_TOKEN, False):
        with pytest.raises(OSError, match="not a valid model identifier"):
            load(repo_id, cache_dir=tmp_path / "yours", token=token)
    assert_same_logits(load(repo_id, cache_dir=tmp_path / "mine"), model)


@pytest.mark.parametrize("private", [None, False])
def test_other_pushes_do_not_publish(hub, model, repo_id, private):
    model.push_to_hub(repo_id, private=True)
    train_a_little(model)
    model.push_to_hub(repo_id, private=private)
    assert repo_of(hub, repo_id).private
    assert_pushed(hub, model, repo_id)


def test_private_push_to_a_public_repository(hub, model, repo_id):
    """What was meant for few eyes is not shown to all."""
    model.push_to_hub(repo_id)
    train_a_little(model)
    with pytest.raises(LayerFusionError, match="is public"):
        model.push_to_hub(repo_id, private=True)
    assert history(hub, repo_id) == ["Upload head"]


# ---- who may -------------------------------------------------------------------------------------------------------


def test_without_a_token(hub, model, repo_id, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    before = len(hub.requests)
    for token in (None, False, True):
        with pytest.raises(LayerFusionError, match=r"needs a token.*hf auth login"):
            model.push_to_hub(repo_id, token=token)
    assert hub.requests[before:] == []
    model.push_to_hub(repo_id, token=hub.token)
    assert history(hub, repo_id) == ["Upload head"]


def test_wrong_token(hub, model, repo_id):
    with pytest.raises(LayerFusionError, match=r"the token is not accepted .*Invalid credentials"):
        model.push_to_hub(repo_id, token="hf_wrong")
    assert ("models", repo_id) not in hub.repos


@pytest.mark.parametrize("taken", [None, "public", "private"], ids=str)
def test_name_of_somebody_else(hub, road, model, repo_id, taken):
    repo_id = repo_id.replace("me/", "you/")
    if taken:
        HfApi().create_repo(repo_id, token=YOUR_TOKEN, private=taken == "private")
    with pytest.raises(LayerFusionError, match="may not write there"):
        model.push_to_hub(repo_id)
    if taken:
        assert list(repo_of(hub, repo_id).refs) == ["refs/heads/main"]
        assert history(hub, repo_id, "main") == [] if taken == "public" else True
    else:
        assert ("models", repo_id) not in hub.repos


@pytest.mark.parametrize("name", ["me/a/b", "me/-head", "me/a head", "me/..", ""])
def test_bad_name(hub, model, name):
    repos = set(hub.repos)
    with pytest.raises(LayerFusionError, match="cannot push to"):
        model.push_to_hub(name)
    assert set(hub.repos) == repos


# ---- the backbone must be known ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "in memory"])
def test_backbone_that_only_this_machine_has(hub, backbone, repo_id, kind):
    folder, hub_id, commit = backbone
    model = build(folder if kind == "folder" else AutoModel.from_pretrained(folder))
    before = len(hub.requests)
    with pytest.raises(LayerFusionError, match=r"backbone is .*, which nobody else has.*backbone_id"):
        model.push_to_hub(repo_id)
    assert hub.requests[before:] == []

    named_here = model.config.backbone_name_or_path, model.config.backbone_revision
    model.push_to_hub(repo_id, backbone_id=hub_id)
    assert (model.config.backbone_name_or_path, model.config.backbone_revision) == named_here
    loaded = load(repo_id)
    assert (loaded.config.backbone_name_or_path, loaded.config.backbone_revision) == (hub_id, commit)
    assert_same_logits(loaded, model)
    card = ModelCard.load(repo_id)
    assert card.data.base_model == hub_id
    assert_names_no_folder(hub, folder, repo_id)


@pytest.mark.parametrize("backbone_id", ["me/no-such-backbone", "./folder", "/tmp"])
def test_bad_backbone_id(hub, model, repo_id, backbone_id):
    with pytest.raises(LayerFusionError, match="backbone_id="):
        model.push_to_hub(repo_id, backbone_id=backbone_id)
    assert ("models", repo_id) not in hub.repos


def test_backbone_id_of_another_backbone(hub, model, repo_id, tmp_path):
    """Other weights under the name are found by whoever loads the head."""
    other = f"{repo_id}-backbone"
    hub.upload_folder(save_tiny_backbone(tmp_path / "other", "vit"), other)
    model.push_to_hub(repo_id, backbone_id=other)
    with pytest.raises(LayerFusionError, match=f"not the backbone that the head was trained on \\({other}"):
        load(repo_id)


def test_backbone_of_a_folder_pushed_with_the_head(hub, backbone, repo_id):
    model = build(backbone[0])
    model.push_to_hub(repo_id, include_backbone=True)
    assert model.config.backbone_name_or_path == str(backbone[0])
    assert_names_no_folder(hub, backbone[0], repo_id)
    assert_same_logits(load(repo_id), model)


# ---- uploads that fail ---------------------------------------------------------------------------------------------

FAILURES = {
    "repository": ("POST", "/repos/create", {"status": 500}),
    "repository, no answer": ("POST", "/repos/create", {}),
    "which files": ("POST", "/preupload/", {"status": 503}),
    "card": ("POST", "/validate-yaml", {"status": 502}),
    "where to": ("POST", "/objects/batch", {"status": 503}),
    "weights": ("PUT", "/lfs/", {"status": 500}),
    "half of the weights": ("PUT", "/lfs/", {"after_bytes": 2000}),
    "weights arrived": ("POST", "/verify$", {"status": 500}),
    "commit": ("POST", "/commit/", {"status": 500}),
    "half of a commit": ("POST", "/commit/", {"after_bytes": 500}),
}


@pytest.mark.parametrize("name", FAILURES)
def test_interrupted_upload(hub, model, repo_id, quick_retries, name):
    """Nothing of it is to be seen, and the next push is as if nothing had been."""
    method, path, how = FAILURES[name]
    complaint = pytest.raises(LayerFusionError, match=f"cannot push to '{repo_id}': .*push again")
    with hub.failing(method, path, **how) as failure, complaint:
        model.push_to_hub(repo_id)
    assert failure.count > 0
    if ("models", repo_id) in hub.repos:
        assert (history(hub, repo_id), repo_of(hub, repo_id).at("main").tree) == ([], {})
    model.push_to_hub(repo_id)
    assert history(hub, repo_id) == ["Upload head"]
    assert_pushed(hub, model, repo_id)


def test_interrupted_update(hub, model, repo_id, quick_retries):
    """What was there stays whole."""
    model.push_to_hub(repo_id)
    assert_pushed(hub, model, repo_id)
    before = repo_of(hub, repo_id).at("main")
    train_a_little(model)
    with hub.failing("PUT", "/lfs/", after_bytes=2000), pytest.raises(LayerFusionError):
        model.push_to_hub(repo_id)
    assert repo_of(hub, repo_id).at("main") is before


@pytest.mark.parametrize("road", ["xet"], indirect=True)
def test_interrupted_xet_upload(hub, road, model, repo_id, quick_retries, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with monkeypatch.context() as patch:
        patch.setattr(hub, "xet_folder", tmp_path / "file" / "xet")
        with pytest.raises(LayerFusionError, match="push again"):
            model.push_to_hub(repo_id)
        assert repo_of(hub, repo_id).at("main").tree == {}
    model.push_to_hub(f"{repo_id}-again")  # 1.5 remembers where Xet was for this repository
    assert_pushed(hub, model, f"{repo_id}-again")


@pytest.mark.parametrize("name", ["which files", "weights"])
def test_upload_that_fails_once(hub, model, repo_id, quick_retries, name):
    """The client tries again by itself."""
    method, path, how = FAILURES[name]
    with hub.failing(method, path, **how, times=1) as failure:
        model.push_to_hub(repo_id)
    assert failure.count == 1
    assert_pushed(hub, model, repo_id)


def test_commit_whose_answer_is_lost(hub, model, repo_id, quick_retries):
    """It is whole, and pushing again finds it."""
    with hub.failing("POST", "/commit/", reply_lost=True), pytest.raises(LayerFusionError, match="push again"):
        model.push_to_hub(repo_id)
    assert_pushed(hub, model, repo_id)
    model.push_to_hub(repo_id)
    assert history(hub, repo_id) == ["Upload head"]


def test_card_that_the_hub_refuses(hub, repo_id, tmp_path):
    """Pushing again would not help."""
    (tmp_path / "README.md").write_text("---\ntags: [1]\n---\n")
    with pytest.raises(LayerFusionError, match=r"Invalid metadata in README\.md") as raised:
        push_folder(repo_id, lambda _: tmp_path, commit_message="A card")
    assert "push again" not in str(raised.value)
    assert history(hub, repo_id) == []


@pytest.mark.parametrize("backbone_id", [None, "me/backbone"])
def test_no_hub(model, repo_id, monkeypatch, backbone_id):
    """Nothing listens on the discard port."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LayerFusionError, match="Connection refused"):
        model.push_to_hub(repo_id, backbone_id=backbone_id)


def test_offline(model, repo_id, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LayerFusionError, match=r"cannot push to .*offline"):
        model.push_to_hub(repo_id)


# ---- Trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset():
    labels = [row % 3 for row in range(12)]
    columns = {"image": [picture(label, seed) for seed, label in enumerate(labels)], "label": labels}
    return Dataset.from_dict(columns, features=Features({"image": Image(), "label": ClassLabel(names=CLASSES)}))


@pytest.fixture(scope="module")
def features(shared_model, dataset, tmp_path_factory):
    return extract_features(shared_model, dataset, tmp_path_factory.mktemp("features"), progress=False)


def test_trainer_on_features(hub, backbone, features, repo_id, tmp_path):
    model = build(backbone[1], id2label=CLASSES)
    options = {"push_to_hub": True, "hub_model_id": repo_id, "hub_private_repo": True, "hub_revision": "next"}
    trainer = build_trainer(
        model, features, tmp_path / "out", eval_features=features, num_train_epochs=2, disable_tqdm=True, **options
    )
    assert repo_of(hub, repo_id).private
    trainer.train()
    measured = trainer.evaluate()
    trainer.push_to_hub(commit_message="Two epochs")
    commit = repo_of(hub, repo_id).at("next")
    assert history(hub, repo_id, "next") == ["Two epochs"]
    assert commit.tree.keys() >= FILES
    assert not [path for path in commit.tree if path.endswith((".bin", ".pt"))], "no pickles"
    (found,) = [
        result.metric_value
        for result in ModelCard.load(hf_hub_download(repo_id, "README.md", revision="next")).data.eval_results
        if result.metric_type == "accuracy"
    ]
    assert found == pytest.approx(measured["eval_accuracy"], abs=1e-4)
    loaded = load(repo_id, revision="next")
    assert loaded.config.id2label == dict(enumerate(CLASSES))
    assert_same_logits(loaded, model)


def test_trainer_refuses_a_local_backbone_before_it_trains(hub, backbone, features, repo_id, tmp_path):
    model = build(backbone[0], id2label=CLASSES)
    with pytest.raises(LayerFusionError, match="which nobody else has"):
        build_trainer(model, features, tmp_path, push_to_hub=True, hub_model_id=repo_id)
    assert ("models", repo_id) not in hub.repos


def test_plain_trainer_on_pixels(hub, backbone, dataset, repo_id, tmp_path):
    """`transformers.Trainer` as it is uploads its output folder; what is in there loads as a head."""
    model = build(backbone[1], id2label=CLASSES)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        push_to_hub=True,
        hub_model_id=repo_id,
        max_steps=2,
        save_steps=1,
        save_strategy="steps",
        per_device_train_batch_size=6,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, data_collator=ImageCollator(model.image_processor))
    trainer.train()
    trainer.push_to_hub(commit_message="Two steps")
    assert history(hub, repo_id)[0] == "Two steps"
    assert repo_of(hub, repo_id).at("main").tree.keys() >= FILES
    loaded = load(repo_id)
    assert loaded.config.backbone_revision == backbone[2]
    assert_same_logits(loaded, model.eval())


# ---- layerfusion push ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(backbone, tmp_path_factory):
    """A head on a backbone that was opened from a folder."""
    folder = tmp_path_factory.mktemp("saved") / "head"
    build(backbone[0]).save_pretrained(folder)
    return str(folder)


def test_command(hub, backbone, saved, repo_id, capsys):
    options = ["--private", "--revision", "next", "--backbone_id", backbone[1], "--commit_message", "By hand"]
    assert main(["push", "--model", saved, "--repo_id", repo_id, *options]) == 0
    repo = repo_of(hub, repo_id)
    assert repo.private
    assert history(hub, repo_id, "next") == ["By hand"]
    assert f"{hub.url}/{repo_id}/commit/{repo.refs['refs/heads/next']}" in capsys.readouterr().out
    assert_pushed(hub, load(saved), repo_id, "next")
    assert_names_no_folder(hub, Path(saved).parent, repo_id, "next")


def test_command_opens_a_pull_request(hub, backbone, saved, repo_id, capsys):
    where = ["push", "--model", saved, "--repo_id", repo_id, "--backbone_id", backbone[1]]
    assert main([*where, "--create_pr", "--commit_message", "Have a look"]) == 0
    assert f"{hub.url}/{repo_id}/discussions/1" in capsys.readouterr().out
    assert history(hub, repo_id) == []
    assert history(hub, repo_id, "refs/pr/1") == ["Have a look"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "which nobody else has"),
        (["--backbone_id", "me/no-such-backbone"], "backbone_id='me/no-such-backbone' cannot be found"),
        (["--include_backbone", "--token", "hf_wrong"], "the token is not accepted"),
        (["--model", "no-such-folder"], "no head can be loaded from 'no-such-folder'"),
        (["--include_backbone", "--repo_id", "you/head"], "may not write there"),
    ],
)
def test_command_that_fails(hub, saved, repo_id, capsys, options, complaint):
    assert main(["push", "--model", saved, "--repo_id", repo_id, *options]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert complaint in printed.err
    assert len([line for line in printed.err.splitlines() if line.startswith("layerfusion push")]) == 1
    assert ("models", repo_id) not in hub.repos


def test_command_pushes_a_space(hub, backbone, saved, repo_id, capsys):
    options = ["--backbone_id", backbone[1], "--space", "--private"]
    assert main(["push", "--model", saved, "--repo_id", repo_id, *options]) == 0
    space = hub.repos["spaces", f"{repo_id}-demo"]
    assert (space.sdk, space.private) == ("gradio", True)
    tree = space.at("main").tree
    assert {"app.py", "README.md", "requirements.txt"} <= tree.keys()
    assert repo_id in "".join(file.data.decode() for path, file in tree.items() if path in ("app.py", "README.md"))
    assert f"{hub.url}/spaces/{repo_id}-demo/commit/{space.refs['refs/heads/main']}" in capsys.readouterr().out


# ---- what was measured goes with the head ------------------------------------------------------------------------


def test_training_record_comes_back_and_goes_on(hub, model, tmp_path):
    model.training_summary = {"dataset": "pictures", "metrics": {"accuracy": 0.5}}
    model.push_to_hub(f"me/{tmp_path.name}")
    loaded = load(f"me/{tmp_path.name}")
    assert loaded.training_summary["metrics"] == {"accuracy": 0.5}
    loaded.save_pretrained(tmp_path / "again")
    assert "0.5" in (tmp_path / "again" / "README.md").read_text()


def test_a_head_that_was_trained_further_has_no_old_record(hub, model, tmp_path):
    """Numbers of other weights on its card would be wrong, whoever trained it."""
    model.training_summary = {"dataset": "pictures", "metrics": {"accuracy": 0.5}}
    model.save_pretrained(tmp_path / "head")
    loaded = load(tmp_path / "head")
    with torch.no_grad():
        loaded.head.classifier.bias += 1
    loaded.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed" / "training_record.json").exists()
    assert "Results" not in (tmp_path / "changed" / "README.md").read_text()
    loaded.training_summary = {"metrics": {"accuracy": 0.75}}
    loaded.save_pretrained(tmp_path / "measured")
    assert "0.75" in (tmp_path / "measured" / "README.md").read_text()

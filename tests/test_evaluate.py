"""evaluate.py: what it measures on cases that are known, and the files it has to refuse."""

import contextlib
import io
import json
import pickle
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import gymnasium as gym
import numpy as np
import pytest
import torch
from helpers import FROZEN, ROOT, SCRIPTS, snapshot, tiny, train
from matplotlib.cm import ScalarMappable
from PIL import Image, ImageSequence

import evaluate
import ppo_acpg


def run(*argv):
    """(exit status or message, stdout) of `python evaluate.py ...`."""
    stdout, old, status = io.StringIO(), sys.argv, 0
    with contextlib.redirect_stdout(stdout):
        sys.argv = ["evaluate.py", *map(str, argv)]
        try:
            runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
        except SystemExit as error:
            status = error.code
        finally:
            sys.argv = old
    return status, stdout.getvalue()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(script, tmp_path):
    """Returns with intervals, all metrics beside their null, a picture, and the same again the second time."""
    train(script, "CartPole-v1", tmp_path, "--total-timesteps", 4096, "--save-model")
    status, stdout = run(tmp_path, "--episodes", 3, "--num-states", 50)
    assert status == 0, status
    result = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("greedy", "sampled"):
        returns = result[name]["returns"]
        assert (
            len(returns) == 3
            and result[name]["low"] <= np.mean(returns) == result[name]["mean"] <= result[name]["high"]
        )
        assert all(value == int(value) and 8 <= value <= 500 for value in returns)
    assert "greedy" in result["labels"] and result["agreement"] == 1 and 2 <= result["states"] <= 50
    assert set(result["collapse"]) == set(result["collapse_null"]) and "etf_error" in stdout
    assert (tmp_path / "collapse.png").exists() or result["collapse"]["classes_present"] < 2
    again = (tmp_path / "evaluation.json").read_bytes()
    run(tmp_path, "--episodes", 3, "--num-states", 50)
    assert (tmp_path / "evaluation.json").read_bytes() == again


def test_greedy_play_of_a_known_policy():
    """On the bandit, an agent that always answers right gets 1 every time, one that is uniform a sixth of them."""

    class Right:
        def logits(self, obs):
            context = obs.argmax(-1)
            return 50.0 * torch.nn.functional.one_hot((5 * context + 2) % 6, 6).float()

    class Uniform:
        def logits(self, obs):
            return torch.zeros(len(obs), 6)

    env = gym.make("probe_envs:Bandit-v0")
    assert (
        evaluate.play(Right(), env, 20, 0, greedy=True)[0] == evaluate.play(Right(), env, 20, 0, greedy=False)[0]
    ).all()
    best = evaluate.play(Right(), env, 200, 0, greedy=True)[0].mean()
    assert evaluate.play(Uniform(), env, 200, 0, greedy=False)[0].mean() < 0.5 * best


def test_what_is_written_is_what_was_measured(tmp_path):
    """Untrained on CliffWalking: greedy play is no sampling, and the metrics are those of the optimal labels."""
    flags = ("--max-episode-steps", 50, "--total-timesteps", 512, "--save-model", "--diagnostics-interval", 0)
    agent = train("ppo_acpg", "CliffWalking-v1", tmp_path, *flags, *FROZEN).agent
    status, _ = run(tmp_path, "--episodes", 20)
    assert status == 0
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert (
        len(set(result["greedy"]["returns"])) == 1 < len(set(result["sampled"]["returns"]))
    )  # nothing is random in it
    args, env = SimpleNamespace(states="random", seed=1000), gym.make("CliffWalking-v1")
    states, labels, _ = evaluate.labelled_states(args, agent, {"gamma": 0.99}, env)
    with torch.no_grad():
        features = agent.features(torch.as_tensor(states))
        greedy = agent.logits(torch.as_tensor(states)).argmax(-1)
    expected = ppo_acpg.collapse_metrics(features, torch.as_tensor(labels), agent.action_layer.weight)
    agreement = (greedy == torch.as_tensor(labels)).double().mean().item()
    assert result["agreement"] == pytest.approx(agreement) and agreement < 0.9
    assert result["collapse"]["alignment"] == pytest.approx(expected["alignment"])


def test_optimal_labels_of_cliff_walking(tmp_path):
    """Up from the start, right along the cliff, down into the goal; ties and unreachable states are left out."""
    flags = ("--max-episode-steps", 50, "--total-timesteps", 512, "--save-model", "--diagnostics-interval", 0)
    agent = train("ppo_baseline", "CliffWalking-v1", tmp_path, *flags)
    env = gym.make("CliffWalking-v1")
    args = evaluate.Args(run=tmp_path)
    states, labels, kind = evaluate.labelled_states(
        args, agent.agent, {"gamma": 0.99, "env_id": "CliffWalking-v1"}, env
    )
    found = dict(zip(states.astype(int).tolist(), labels.tolist(), strict=True))
    assert found[36] == 0 and found[35] == 2  # from the start up, above the goal down
    assert all(found[24 + column] == 1 for column in range(11))  # the row above the cliff
    assert 0 not in found  # the upper left corner: right and down are equally good
    assert not set(found) & set(range(37, 48)) and "tied" in kind
    status, stdout = run(tmp_path, "--episodes", 2)
    assert status == 0 and "optimal" in stdout


def test_states_can_be_given(tmp_path):
    train("ppo_acpg", "CartPole-v1", tmp_path, *tiny("ppo_acpg"), "--save-model")
    np.save(
        tmp_path / "states.npy",
        0.1 * np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32).repeat(2, axis=0),
    )
    status, _ = run(tmp_path, "--episodes", 2, "--states", tmp_path / "states.npy", "--out", tmp_path / "out")
    assert (
        status == 0 and json.loads((tmp_path / "out" / "evaluation.json").read_text())["states"] == 30
    )  # repeated ones once
    np.save(tmp_path / "wrong.npy", np.zeros((3, 5)))
    np.save(tmp_path / "nan.npy", np.full((3, 4), np.nan))
    np.save(tmp_path / "outside.npy", np.full((3, 4), 9.0))  # where the track ends at 4.8
    (tmp_path / "text.npy").write_text("states")
    for bad in ("wrong.npy", "absent.npy", "nan.npy", "outside.npy", "text.npy", "."):
        status, _ = run(tmp_path, "--episodes", 2, "--states", tmp_path / bad, "--out", tmp_path / "out")
        assert str(status).startswith("error: --states") and "\n" not in status


def test_video(tmp_path):
    train("ppo_acpg", "CartPole-v1", tmp_path, *tiny("ppo_acpg"), "--save-model")
    assert run(tmp_path, "--episodes", 2, "--video")[0] == 0
    assert list((tmp_path / "videos").glob("evaluation*.mp4"))


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    """Found in the working directory, as by the scripts, once it is confirmed; the repository's own is found
    anywhere."""
    monkeypatch.chdir(tmp_path)
    Path("lantern.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('Lantern-v0', 'gymnasium.envs.classic_control:CartPoleEnv', max_episode_steps=30)\n"
    )
    for env_id in ("lantern:Lantern-v0", "environments.ideal_cliff:IdealCliffWalking-v0"):
        command = [sys.executable, ROOT / "ppo_acpg.py", "--env-id", env_id, "--run-dir", "run", "--save-model"]
        command += tiny("ppo_acpg")
        subprocess.run([str(word) for word in command], check=True, capture_output=True)
        command = [sys.executable, str(ROOT / "evaluate.py"), "run", "--episodes", "2"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 1 and f"confirm it with --env-id {env_id}" in result.stderr
        subprocess.run([*command, "--env-id", env_id], check=True, capture_output=True)
    assert "optimal" in json.loads(Path("run/evaluation.json").read_text())["labels"]


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_what_is_no_checkpoint_is_refused(tmp_path, monkeypatch):
    """One line, and nothing is run or written."""
    monkeypatch.chdir(tmp_path)
    train("ppo_acpg", "CartPole-v1", tmp_path / "run", *tiny("ppo_acpg"), "--save-model")
    good = torch.load(tmp_path / "run" / "model.pt", weights_only=True)
    files = {
        "text": b"not a checkpoint",
        "empty": b"",
        "truncated": (tmp_path / "run" / "model.pt").read_bytes()[:2000],
    }
    files["pickle"] = pickle.dumps(Malicious())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    torch.save(good | {"agent": Malicious()}, tmp_path / "code")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign")
    torch.save([1, 2], tmp_path / "list")
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in good["agent"].items()}
    torch.save(good | {"agent": state}, tmp_path / "nan")
    torch.save(good | {"args": good["args"] | {"env_id": "Acrobot-v1"}}, tmp_path / "other")
    torch.save(good | {"args": good["args"] | {"env_id": "probe_envs:Bandit-v0"}}, tmp_path / "module")
    torch.save(good | {"args": good["args"] | {"env_id": "Nonsense-v9"}}, tmp_path / "unknown")
    bad = {
        "gamma": 1.5,
        "feature_constraint": "cube",
        "action_layer": 3,
        "feature_dim": "wide",
        "etf_scale": float("nan"),
    }
    for key, value in bad.items():
        torch.save(good | {"args": good["args"] | {key: value}}, tmp_path / f"script argument {key}")
    torch.save(good | {"args": good["args"] | {"no_such": 1, "env_kwargs": "[1]"}}, tmp_path / "script kwargs")
    (tmp_path / "script folder" / "model.pt").mkdir(parents=True)
    for script in ("os", "evaluate", ["ppo_acpg"], None, "ppo_baseline"):  # none that may be imported, or another one's
        torch.save(good | {"script": script}, tmp_path / f"script {script}")
    torch.save({key: value for key, value in good.items() if key != "script"}, tmp_path / "script")
    before = snapshot(tmp_path)
    for name in (
        *files,
        *(path.name for path in tmp_path.glob("script*")),
        "code",
        "foreign",
        "list",
        "nan",
        "other",
        "module",
        "unknown",
        "absent",
    ):
        status, stdout = run(tmp_path / name)
        assert isinstance(status, str) and status.startswith("error: ") and "\n" not in status and not stdout, (
            name,
            status,
        )
    assert snapshot(tmp_path) == before


def test_any_flipped_byte_is_noticed_or_harmless(tmp_path):
    """The archive's checksums: what is read is what was written, or one line."""
    train("ppo_acpg", "CartPole-v1", tmp_path / "run", *tiny("ppo_acpg"), "--save-model")
    content = (tmp_path / "run" / "model.pt").read_bytes()
    good = torch.load(tmp_path / "run" / "model.pt", weights_only=True)["agent"]
    refused, path = 0, tmp_path / "model.pt"
    for position in np.random.default_rng(0).integers(len(content), size=150):
        path.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        try:
            agent, _, env = evaluate.load(evaluate.Args(run=path))
        except SystemExit as error:
            assert str(error).startswith("error: ") and "\n" not in str(error)
            refused += 1
        else:
            env.close()
            assert all(torch.equal(agent.state_dict()[name], good[name]) for name in good)
    assert refused > 100


def test_a_checkpoint_of_an_unfinished_run(tmp_path):
    """checkpoint.pt is read like model.pt."""
    flags = (*tiny("ppo_acpg"), "--save-model", "--checkpoint-interval", 1)
    result = train("ppo_acpg", "CartPole-v1", tmp_path, *flags)
    result.run.file = open(tmp_path / "progress.csv", "a")
    result.run.save("checkpoint.pt", 1)
    assert run(tmp_path / "checkpoint.pt", "--episodes", 2, "--num-states", 20)[0] == 0


@pytest.mark.parametrize("script", ["ppo_acpg", "reinforce_baseline"])
def test_images_and_structured_observations(script, tmp_path, monkeypatch):
    """As the script takes them."""
    for env_id in ("Image", "MixedObservation"):
        own = () if script.startswith("ppo") else ("--num-episodes", 4)
        train(script, env_id, tmp_path / env_id, *tiny(script), *own, "--save-model")
        confirm = ("--env-id", f"probe_envs:{env_id}-v0")
        assert run(tmp_path / env_id, *confirm, "--episodes", 2, "--num-states", 20)[0] == 0


def test_an_environment_without_render_mode(tmp_path):
    """It is not asked for one."""
    train("ppo_acpg", "Plain", tmp_path, *tiny("ppo_acpg"), "--save-model")
    assert run(tmp_path, "--env-id", "probe_envs:Plain-v0", "--episodes", 2)[0] == 0
    status, _ = run(tmp_path, "--env-id", "probe_envs:Plain-v0", "--episodes", 2, "--video")
    assert str(status).startswith("error: ") and "render_mode" in status


def test_episodes_that_never_end(tmp_path):
    """Are cut, counted so far, and that is said."""
    train("ppo_acpg", "Endless", tmp_path, *tiny("ppo_acpg"), "--save-model")
    status, stdout = run(tmp_path, "--env-id", "probe_envs:Endless-v0", "--episodes", 3, "--max-steps", 40)
    assert status == 0 and "3 of them had not ended" in stdout
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert result["greedy"]["returns"] == [40.0] * 3 and result["sampled"]["cut"] == 3
    train("ppo_acpg", "ConstantReward", tmp_path / "short", *tiny("ppo_acpg"), "--save-model")
    status, stdout = run(tmp_path / "short", "--env-id", "probe_envs:ConstantReward-v0", "--episodes", 3)
    assert status == 0 and "had not ended" not in stdout


# Pictures


def animated(folder, *flags):
    """What evaluate.py --animate says of a run, and the pictures of its GIF with the milliseconds that each stays."""
    status, stdout = run(folder, "--animate", "--num-states", 60, "--episodes", 2, "--max-steps", 40, *flags)
    if status:
        return status, []
    with Image.open(folder / "collapse.gif") as gif:
        frames = [(np.array(frame.convert("RGB")), gif.info["duration"]) for frame in ImageSequence.Iterator(gif)]
    return status, frames


@pytest.mark.parametrize("env_id", ("CartPole-v1", "Acrobot-v1", "LunarLander-v3"))  # K = 2, 3 and 4
def test_animation(env_id, tmp_path):
    """A frame for each checkpoint, of activations that move; the last one stays."""
    flags = ("--total-timesteps", 4096, "--checkpoint-interval", 2, "--keep-checkpoints", "--save-model")
    train("ppo_acpg", env_id, tmp_path, *flags)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3  # of 8 updates; after the last one there is model.pt
    status, frames = animated(tmp_path)
    assert status == 0 and len(frames) == 3 and frames[-1][1] > 1000, status
    (first, _), (second, _), (last, _) = frames
    assert (first != second).any() and (second != last).any()
    assert (tmp_path / "collapse.gif").stat().st_size < 2e6


def test_animation_needs_checkpoints(tmp_path):
    train("ppo_acpg", "CartPole-v1", tmp_path, *tiny("ppo_acpg"), "--save-model")
    status, _ = animated(tmp_path)
    assert "--keep-checkpoints" in status and "\n" not in status


def test_many_checkpoints_are_thinned(tmp_path):
    flags = ("--total-timesteps", 1024, "--num-steps", 8, "--checkpoint-interval", 1, "--keep-checkpoints")
    train("a2c_acpg", "CartPole-v1", tmp_path, *flags)
    paths = sorted(int(path.stem) for path in (tmp_path / "checkpoints").iterdir())
    read = list(evaluate.read_checkpoints(evaluate.Args(tmp_path), torch.zeros(3, 4), most=5))
    assert [step for step, _, _ in read][:: len(read) - 1] == [paths[0], paths[-1]]
    assert len(read) == 5 and all(features.shape == (3, 64) for _, _, features in read)


@pytest.mark.parametrize("classes", ((0, 1, 2, 3, 4), (7, 50)))
def test_cosines_of_many_actions(classes, tmp_path):
    """K = 51: the heat maps show the cosines of the class means that occur, and of their weights."""
    weight = ppo_acpg.simplex_etf(51, 64)
    labels = torch.tensor(classes).repeat(20)
    features = weight[labels] + 0.01 * torch.randn(len(labels), 64, generator=torch.Generator().manual_seed(0))
    shown = []
    with patch("matplotlib.axes.Axes.imshow", lambda axes, image, **kwargs: shown.append(image) or ScalarMappable()):
        with patch("matplotlib.figure.Figure.colorbar"):
            evaluate.draw_cosines(features, labels, weight, "title", tmp_path / "collapse.png")
    assert len(shown) == 2
    for image in map(torch.as_tensor, shown):
        assert image.shape == (len(classes), len(classes))
        assert torch.allclose(image, torch.eye(len(classes)) * (1 - image[0, 1]) + image[0, 1], atol=0.02)
        assert float(image[0, 1]) == pytest.approx(-1 / (len(classes) - 1), abs=0.02)
    evaluate.draw_cosines(features, labels, weight, "title", tmp_path / "collapse.png")
    assert (tmp_path / "collapse.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_more_than_four_actions(tmp_path, monkeypatch):
    """And a video, of a discretised task."""
    monkeypatch.syspath_prepend(ROOT)
    env_id = "environments.discretized:Pendulum11-v0"
    train("ppo_acpg", env_id, tmp_path, *tiny("ppo_acpg"), "--save-model", "--env-kwargs", "{}")
    status, stdout = run(tmp_path, "--env-id", env_id, "--episodes", 2, "--num-states", 50, "--video")
    assert status == 0, status
    assert (tmp_path / "collapse.png").exists() == ("classes_present               1" not in stdout)
    assert list((tmp_path / "videos").glob("*.mp4"))

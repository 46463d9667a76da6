"""Parity of ppo_baseline.py with Stable-Baselines3's PPO at equal hyperparameters: the runs behind docs/parity.md.

    pip install stable-baselines3==2.9.2 scipy==1.17.1
    python tests/parity_sb3.py

Runs land in runs/parity/ and are kept: a finished run is not repeated. Prints markdown. The mapping of the
hyperparameters and the margins, which were fixed before the first run, are explained in docs/parity.md.
"""

import csv
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "parity"
# environment, rollouts of 4 x 128 steps, learning rate, whether the value loss is clipped
COMPARISONS = [
    ("CartPole-v1", 390, 2e-3, True),
    ("LunarLander-v3", 390, 2e-3, True),
    ("CartPole-v1", 976, 2.5e-4, False),
]
MARGINS = {"CartPole-v1": {"auc": 25, "final": 25}, "LunarLander-v3": {"auc": 40, "final": 60}}


@dataclass
class Args:
    seeds: int = 10
    """seeds 1 to this"""
    jobs: int = 2
    """runs at a time"""
    sb3: str = ""
    """(internal) run Stable-Baselines3 once: COMPARISON:SEED:FILE"""


def run_sb3(comparison, seed, path):
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Episodes(BaseCallback):
        episodes = []

        def _on_step(self):
            self.episodes += [(self.num_timesteps, info["episode"]["r"]) for info in self.locals["infos"] if "episode" in info]
            return True

    env_id, rollouts, rate, clip = comparison
    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy",
        make_vec_env(env_id, n_envs=4, seed=seed, env_kwargs={"render_mode": None}),
        learning_rate=lambda remaining: rate * (remaining + 1 / rollouts),
        n_steps=128,
        batch_size=128,
        n_epochs=4,
        clip_range_vf=0.2 if clip else None,
        ent_coef=0.01,
        vf_coef=0.25,
        seed=seed,
        device="cpu",
    )
    callback = Episodes()
    model.learn(rollouts * 512, callback=callback)
    Path(path).write_text(json.dumps([(int(step), float(value)) for step, value in callback.episodes]))


def run(command):
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr[-1000:]}")


def name(program, comparison, seed):
    env_id, rollouts, rate, clip = comparison
    return RUNS / f"{program}__{env_id}__{rollouts}__{rate}__{'clip' if clip else 'noclip'}__{seed}"


def curve_sb3(comparison, seed):
    """Mean return of the episodes that ended in each of the 199 equal windows of training, nan where none did."""
    path = name("sb3", comparison, seed)
    if not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        run([sys.executable, __file__, "--sb3", f"{COMPARISONS.index(comparison)}:{seed}:{temporary}"])
        temporary.replace(path)
    steps, values = np.array(json.loads(path.read_text())).T
    window = (np.ceil(steps / 512) - 1) * 199 // comparison[1] + 1  # as progress.csv of ppo_baseline.py counts them
    return np.array([values[window == i].mean() if (window == i).any() else np.nan for i in range(1, 200)])


def curve_ours(comparison, seed):
    folder, (env_id, rollouts, rate, clip) = name("ppo_baseline", comparison, seed), comparison
    try:
        finished = json.loads((folder / "run.json").read_text())["status"] == "finished"
    except OSError:
        finished = False
    if not finished:
        command = [sys.executable, str(ROOT / "ppo_baseline.py"), "--env-id", env_id, "--seed", str(seed)]
        command += ["--learning-rate", str(rate), "--total-timesteps", str(rollouts * 512), "--run-dir", str(folder)]
        run([*command, "--clip-vloss" if clip else "--no-clip-vloss"])
    with open(folder / "progress.csv") as file:
        values = [row["charts/episodic_return"] for row in csv.DictReader(file)][1:]
    return np.array([float(value) if value else np.nan for value in values])


def main():
    args = tyro.cli(Args)
    if args.sb3:
        index, seed, path = args.sb3.split(":", 2)
        return run_sb3(COMPARISONS[int(index)], int(seed), path)
    from scipy import stats

    RUNS.mkdir(parents=True, exist_ok=True)
    seeds = range(1, args.seeds + 1)
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            (comparison, curve): [pool.submit(curve, comparison, seed) for seed in seeds]
            for comparison in COMPARISONS
            for curve in (curve_ours, curve_sb3)
        }
    print("| environment | steps, lr | value loss | measure | ours | SB3 | difference, 95 % interval | margin | verdict |")
    print("|---|---|---|---|---|---|---|---|---|")
    for comparison in COMPARISONS:
        env_id, rollouts, rate, clip = comparison
        for measure, first in (("auc", 0), ("final", -20)):
            ours, theirs = (
                np.array([np.nanmean(future.result()[first:]) for future in futures[comparison, curve]])
                for curve in (curve_ours, curve_sb3)
            )
            interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
            margin = MARGINS[env_id][measure]
            inside = max(abs(interval.low), abs(interval.high)) < margin
            cells = [env_id, f"{rollouts * 512:,}, {rate}", "clipped" if clip else "plain", measure]
            cells += [f"{x.mean():.1f} (sd {x.std(ddof=1):.1f})" for x in (ours, theirs)]
            cells += [f"{ours.mean() - theirs.mean():+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]", str(margin)]
            verdict = "equivalent" if inside else "not decided" if interval.low < 0 < interval.high else "different"
            print(f"| {' | '.join(cells)} | {verdict} |", flush=True)


if __name__ == "__main__":
    main()

"""The tables of README and docs are what the committed CSVs say."""

import csv
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT

import learning
import parity
import tables


def test_the_committed_tables():
    """Run python studies/tables.py if this fails."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "studies" / "tables.py"), "--check"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_a_number_that_differs_is_found(tmp_path, monkeypatch, capsys):
    text = (ROOT / "README.md").read_text()
    assert text.count("<!-- table ") >= 3
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", ("README.md",))
    (tmp_path / "README.md").write_text(text.replace("| .626, .996 |", "| .626, .626 |"))
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="README.md differ"):
        tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    assert (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("<!-- table nothing -->\n<!-- end -->")
    with pytest.raises(SystemExit, match="nothing"):
        tables.main()


PLACES = {"README.md": 5, "docs/learning.md": 12, "docs/parity.md": 1, "docs/study.md": 17}
PLACES |= {"docs/action_collapse.md": 1, "results/emergence/README.md": 1}


def test_no_table_loses_its_marks(tmp_path, monkeypatch):
    """A table without them is checked no more: documents have as many as they had, and a misspelt mark fails."""
    counts = {name: len(tables.PLACE.findall((ROOT / name).read_text())) for name in tables.DOCUMENTS}
    assert {name: count for name, count in counts.items() if count} == PLACES
    for text in ("<!-- tabel throughput -->\n\n<!-- end -->", "<!-- table throughput -->", "<!-- end -->"):
        with pytest.raises(LookupError, match="mark"):
            tables.fill(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", ("README.md",))
    (tmp_path / "README.md").write_text("<!-- table throughput -->\n<!-- end -->")
    (tmp_path / "throughput").mkdir()
    for name in ("ppo", "a2c", "minatar"):
        (tmp_path / "throughput" / f"{name}.csv").write_text("round,ppo_acpg.py\n1,2\n")
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="README.md lacks 'SB3'"):
        tables.main()


def test_numbers():
    """Rounded once, from the CSV's digits."""
    assert [tables.short(x) for x in ("-0.04849", "0.05449", "24.4321", "-49228.6", "0")] == [
        *("-.048", ".054", "24.4", "-49,229", ".000"),
    ]


def test_tables_of_learning(tmp_path, monkeypatch):
    """From runs to CSVs to tables: each seed in its place, gaps left out, the last measurement as trained."""
    curves = {"global_step": np.array([0.0, 50, 100]), "charts/episodic_return": np.array([np.nan, 10, 30])}
    runs = []
    for seed, alignment in ((1, 0.5), (2, 0.7), (3, np.nan)):
        own = {"collapse/alignment": np.array([0.1, np.nan, alignment]), "collapse/classes_present": np.full(3, 2.0)}
        own |= {"collapse_null/alignment": np.array([0.0, np.nan, 0.05])}
        run = SimpleNamespace(curves=curves | own, record={"final_return": 20.0 + seed})
        runs.append(learning.rows_of(run, "CartPole-v1, ACPG", seed))
    row, curve = runs[0]
    assert (row["auc"], row["untrained_alignment"], row["trained_alignment"]) == (20, 0.1, 0.5)
    assert [(point["step"], point["return"]) for point in curve] == [(50, 10), (100, 30)]
    (tmp_path / "learning").mkdir()
    for row, _ in runs:  # columns that these runs don't have
        row.update({f"{kind}_{m}": np.nan for m in tables.METRICS[::4] for kind in ("trained", "null")})
        row.update({f"{kind}_{m}": 0.2 for m in tables.METRICS[1:4:2] for kind in ("trained", "null")})
    learning.save_rows(tmp_path / "learning" / "report-ppo.csv", [row for row, _ in runs])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    line = tables.learning("report-ppo")[-1]
    assert line == "| CartPole-v1, ACPG | 22.0 | 21 22 23 | 22 +- 0.58 | 20 +- 0 |"
    cells = tables.collapse("report-ppo")[-1].split(" | ")
    assert cells[:4] == ["| CartPole-v1, ACPG", "2 +- 0", "undefined", "undefined"]
    assert cells[6:8] == ["0.6 +- 0.1", "0.05 +- 0"] and cells[8:11] == ["void"] * 3  # of two classes


def test_runs_of_two_actions_say_nothing_of_the_etf_error(tmp_path, monkeypatch):
    """Whose zeros would else be averaged in; trained and untrained networks may differ in it."""
    metrics = [f"{kind}_{metric}" for kind in ("trained", "untrained", "null") for metric in tables.METRICS]
    rows = [{"arm": "a", "trained_classes_present": c, "untrained_classes_present": u} for c, u in ("33", "32", "23")]
    values = [dict.fromkeys(metrics, value) for value in ("0.4", "0.6", "0")]
    (tmp_path / "learning").mkdir()
    with open(tmp_path / "learning" / "s.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0] | values[0]))
        writer.writeheader()
        writer.writerows(row | own for row, own in zip(rows, values, strict=True))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    cells = tables.collapse("s")[2].split(" | ")
    assert cells[8:11] == ["0.5 +- 0.1", "0.2 +- 0.2", "0.5 +- 0.1"]


def test_the_table_of_the_default(tmp_path, monkeypatch):
    """The best rate of each task, not one for all; failures at all of them."""
    folder = tmp_path / "default" / "default"
    folder.mkdir(parents=True)
    rows = ["env,algo,arm,value,seeds,area,failed", "a,ppo,acpg,1e-3,3,.2,2", "a,ppo,acpg,2e-3,3,.4,1"]
    rows += ["b,ppo,acpg,1e-3,3,.9,0", "b,ppo,acpg,2e-3,3,.7,0"]
    (folder / "grid.csv").write_text("\n".join(rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.default()[2:] == ["| `acpg` | .400 (2e-3) | .900 (1e-3) | .6500 | 3 of 12 |"]


def test_the_table_of_longer_runs(tmp_path, monkeypatch):
    (tmp_path / "learning").mkdir()
    rows = ["arm,seed,final,auc", '"x-v1, baseline",1,5,40', '"x-v1, baseline",2,7,40']
    text = "\n".join([*rows, '"x-v1, ACPG",1,1,38', '"x-v1, ACPG",2,1,44'])
    for algo in ("ppo", "a2c", "reinforce", "trpo"):
        (tmp_path / "learning" / f"report-{algo}.csv").write_text(text)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.longer_runs()[3] == "| A2C, x-v1 | 6.0, 6 +- 1 | 1.0, 1 +- 0 | -5 +- 1 | +1 +- 3 |"


def test_the_table_of_parity(tmp_path, monkeypatch):
    """A comparison that is made again replaces its rows, and leaves those of others; in the protocol's order."""
    path = tmp_path / "parity" / "parity.csv"
    path.parent.mkdir()
    common = {"steps": 200000, "learning_rate": 0.001, "seeds": 20, "measure": "auc", "ours": 20.04, "ours_sd": 3.0}
    common |= {"sb3": 19.0, "sb3_sd": 2.0, "difference": 1.04, "low": -1.0, "high": 3.08, "margin": 25, "verdict": "x"}
    row = lambda name, **more: {"comparison": name, "env": "CartPole-v1"} | common | more  # noqa: E731
    parity.save_rows(path, [row("TRPO"), row("of an older protocol")])
    parity.save_rows(path, [row("PPO"), row("A2C")])
    parity.save_rows(path, [row("A2C", verdict="equivalent")])
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.parity()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| PPO", "| A2C", "| TRPO"]
    assert lines[1].endswith("| 20 | auc | 20.0 (sd 3.0) | 19.0 (sd 2.0) | +1.0 [-1.0, +3.1] | 25 | equivalent |")


def test_tables_of_the_ideal_environment(tmp_path, monkeypatch):
    """Means over seeds; conditions from the learned layer alone, permuted labels from every cell and layer."""
    (tmp_path / "emergence").mkdir()
    metrics = ("alignment", "variability_quotient", "etf_error")
    rows = ["cell,layer,seed," + ",".join([*metrics, *(f"null_{metric}" for metric in metrics), "optimal"])]
    for cell in ("ideal", *tables.TAKEN_AWAY):
        rows += [f"{cell},learned,{seed},{x},.2,.3,.4,2,.6,{seed - 1}" for seed, x in ((1, 0.5), (2, 0.7))]
        rows += [f"{cell},etf,1,.9,.9,.9,.{1 + (cell == 'ideal')},20,.8,1"]
    (tmp_path / "emergence" / "emergence.csv").write_text("\n".join(rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.conditions()[2:]
    assert len(lines) == 9 and lines[0] == "| none: the ideal cell | .600 | .200 | .300 | 50 % |  |"
    assert tables.permuted()[2:] == ["| labels permuted | .10 to .40 | 2 to 20 | .60 to .80 |"]


def test_the_table_of_throughput(tmp_path, monkeypatch):
    """Ratios within a round, not of medians."""
    (tmp_path / "throughput").mkdir()
    for name in ("ppo", "a2c", "minatar"):
        programs = [f"{name.replace('minatar', 'ppo')}_{x}" for x in ("acpg.py --compile", "baseline.py", "acpg.py")]
        rows = [["round", *programs, "SB3"], [1, 400, 100, 200, 100], [2, 90, 40, 60, 20], [3, 5, 5, 5, 5]]
        (tmp_path / "throughput" / f"{name}.csv").write_text("\n".join(",".join(map(str, row)) for row in rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    lines = tables.throughput()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| `*_baseline.py`", "| `*_acpg.py`", "| `*_acpg.py --compile`"]
    assert [line.split(" | ")[1] for line in lines] == [
        *("1.00 (1.00 to 2.00)", "2.00 (1.00 to 3.00)", "4.00 (1.00 to 4.50)"),
    ]


def test_tables_of_the_tuned_study(tmp_path, monkeypatch):
    """Wins and losses alike, bold only if they survive Holm; what is not identified says so."""
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    (tmp_path / "tuned").mkdir()
    head = "algo,env,seeds,flag,baseline_at,acpg_at,baseline_edge,acpg_edge,baseline_reached,acpg_reached,"
    head += "measure,baseline,acpg,difference,low,high,p,p_holm\n"
    rows = [
        "ppo,environments.discretized:Pendulum51-v0,20,--learning-rate,8e-3,2.5e-2,False,True,7,19,auc,.5,.6,.1,.05,.15,.001,.01",
        "ppo,environments.discretized:Pendulum51-v0,20,--learning-rate,8e-3,2.5e-2,False,True,7,19,final,.9,.8,-.1,-.15,-.05,.1,.2",
        "a2c,CartPole-v1,10,--learning-rate,2e-3,2e-3,False,False,1,2,auc,.5,.4,-.1,-.2,-.01,.01,.04",
        "a2c,CartPole-v1,10,--learning-rate,2e-3,2e-3,False,False,1,2,final,.5,.4,-.1,-.2,-.01,.01,.06",
    ]
    (tmp_path / "tuned" / "tasks.csv").write_text(head + "\n".join(rows) + "\n")
    assert tables.TABLES["tuned PPO"]()[2:] == [
        "| Pendulum51 | 8e-3 | 2.5e-2 *edge* | 20 | .500, .600 | **.100 [.050, .150]** | "
        ".900, .800 | -.100 [-.150, -.050] | 7, 19 |"
    ]
    assert tables.TABLES["tuned others"]()[2:] == [
        "| A2C | CartPole | 2e-3 | 2e-3 | 10 | .500, .400 | **-.100 [-.200, -.010]** | "
        ".500, .400 | -.100 [-.200, -.010] | 1, 2 |"
    ]
    assert tables.TABLES["tuned tasks"]()[2:] == [
        "| PPO | Pendulum51 | .500, .600 | **.100 [.050, .150]** | .900, .800 | -.100 [-.150, -.050] | 20 |",
        "| A2C | CartPole | .500, .400 | **-.100 [-.200, -.010]** | .500, .400 | -.100 [-.200, -.010] | 10 |",
    ]
    (tmp_path / "tuned" / "common.csv").write_text((tmp_path / "tuned" / "tasks.csv").read_text())
    lines = tables.TABLES["tuned common"]()[2:]
    assert [line.split(" | ")[:2] for line in lines] == [["| PPO", "Pendulum51"], ["| A2C", "CartPole"]]
    assert "**" not in "".join(lines)
    head = "task,measure,estimate,low,high,identified\n"
    rows = ['CartPole-v1,"shift, decades",.2,.1,.3,True', "CartPole-v1,left after it,.01,0,.02,False"]
    (tmp_path / "tuned" / "shift_without.csv").write_text(head + "\n".join(rows) + "\n")
    assert tables.TABLES["tuned shift without"]()[2:] == [
        "| CartPole | .20 [.10, .30] | .01 [.00, .02], not identified |"
    ]
    rows += ["CartPole-v1,best rate of each task,-.1,-.2,.3,True", 'CartPole-v1,"plateau, decades",.4,,,True']
    (tmp_path / "tuned" / "shift.csv").write_text(head + "\n".join(rows) + "\n")
    assert tables.TABLES["tuned shift"]()[2:] == [
        "| CartPole | .20 [.10, .30] | .01 [.00, .02], not identified | -.10 [-.20, .30] | .40 |"
    ]
    head = "question,arm,against,tasks,seeds,one_edge,measure,of_arm,of_against,difference,low,high,lead\n"
    rows = [
        "all,acpg,baseline,9,8,2,auc,.6,.5,.1,.05,.15,ahead",
        "all,acpg,baseline,9,8,2,final,.4,.5,-.1,-.15,-.05,behind",
    ]
    (tmp_path / "tuned" / "comparisons.csv").write_text(head + "\n".join(rows) + "\n")
    first, second = tables.TABLES["tuned comparisons"]()[2:]
    assert first == "| all: `acpg` against `baseline` | 9 (*edge* 2) | area | .500 | .600 | .100 [.050, .150] | ahead |"
    assert second.startswith("|  | 9 (*edge* 2) | final return |") and second.endswith("| behind |")
    name = '"geometry in K - 1 = 3 dimensions, X",etf-3,random-3,1,10,0,'
    rows += [
        name + "auc,.6,.5,.1,.05,.15,ahead",
        name + "final,.4,.5,-.1,-.15,-.05,behind",
        name + "fewer failures,,,,,,",
    ]
    (tmp_path / "tuned" / "comparisons.csv").write_text(head + "\n".join(rows) + "\n")
    assert tables.TABLES["tuned comparisons"]()[2:] == [first, second]
    assert tables.TABLES["tuned ablations"]()[2:] == [
        "| geometry in K - 1 = 3 dimensions, X | `etf-3` against `random-3` | .500, .600 | .100 [.050, .150], ahead | "
        ".500, .400 | -.100 [-.150, -.050], behind |"
    ]
    head = "outcome,tasks,seeds,of_tasks,one_edge,p,difference,low,high,corrected_low,corrected_high,p_holm,verdict\n"
    row = '"acpg, final return, tasks + minatar",9,8,9,0,.3,.01,0,.02,-.01,.03,.0006,equivalent\n'
    (tmp_path / "tuned" / "primary.csv").write_text(head + row)
    assert tables.TABLES["tuned primary"]()[2:] == [
        "| final return | 9 | .010 | [-.010, .030] | below .001 | equivalent |"
    ]


def test_the_table_of_collapse_beside_reward(tmp_path, monkeypatch):
    """Signs such that above 0 is more collapse with more reward: more alignment, less variability, less error."""
    (tmp_path / "tuned").mkdir()
    rows = ["part,env,algo,arm,metric,runs,met,correlation,at_equal_area", "tasks,c,ppo,acpg,etf_error,0,0,,"]
    rows += ["tasks,c,ppo,acpg,all three,20,1,,"]
    for metric in ("alignment", "variability_quotient", "etf_error"):
        rows += [f"tasks,{env},ppo,acpg,{metric},20,2,{x},{x / 2}" for env, x in (("a", 0.2), ("b", -0.6), ("c", 0.4))]
    (tmp_path / "tuned" / "collapse.csv").write_text("\n".join(rows) + "\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES["tuned collapse"]()[2:] == [
        "| AC1: alignment | 6 of 60 | 2 of 3 | .20 [-.20, .30] | 2 of 3 | .10 [-.10, .15] |",
        "| AC2: variability | 6 of 60 | 1 of 3 | -.20 [-.30, .20] | 1 of 3 | -.10 [-.15, .10] |",
        "| AC3: ETF error | 6 of 60 | 1 of 3 | -.20 [-.30, .20] | 1 of 3 | -.10 [-.15, .10] |",
        "| all three | 1 of 20 |  |  |  |  |",
    ]


def test_the_table_of_who_is_nearer_to_collapse(tmp_path, monkeypatch):
    """More alignment is nearer, less variability; two actions say nothing of the ETF error; other arms have no part."""
    head = "env,algo,arm,metric,seeds,untrained,untrained_defined,trained,defined,low,high,null,null_defined,void\n"
    line = "{},ppo,{},{},9,0,9,{},9,{},{},0,9,{}"
    rows = [
        line.format("a", arm, "alignment", *x, False)
        for arm, x in (("baseline", (0.5, 0.4, 0.6)), ("acpg", (0.8, 0.7, 0.9)))
    ]
    rows += [
        line.format("b", arm, "alignment", *x, False)
        for arm, x in (("baseline", (0.6, 0.5, 0.7)), ("acpg", (0.7, 0.6, 0.8)))
    ]
    rows += [
        line.format("b", "acpg2", "alignment", 0.9, 0.9, 0.9, False),
        line.format("c", "random", "alignment", 1, 1, 1, False),
    ]
    for metric in ("variability_quotient", "etf_error", "mean_weight_cosine"):
        for arm, x in (("baseline", (0.2, 0.1, 0.3)), ("acpg", (0.5, 0.4, 0.6))):
            rows += [
                line.format("a", arm, metric, *x, False),
                line.format("b", arm, metric, 0, 0, 0, metric == "etf_error"),
            ]
    folder = tmp_path / "tuned" / "p" / "reports" / "tuned" / "report"
    folder.mkdir(parents=True)
    (folder / "collapse.csv").write_text(head + "\n".join(rows) + "\n")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.TABLES["tuned nearer"]()[2:] == [
        "| AC1: alignment | .550, .750 | 2 of 2 | 1 | 0 |",
        "| AC2: variability | .100, .250 | 0 of 2 | 0 | 1 |",
        "| AC3: ETF error | .200, .500 | 0 of 1 | 0 | 1 |",
        "| AC3: cosine of means and weights | .100, .250 | 1 of 2 | 1 | 0 |",
    ]


def test_the_tables_of_the_checks(tmp_path, monkeypatch):
    (tmp_path / "tuned").mkdir()
    monkeypatch.setattr(tables, "RESULTS", tmp_path)

    def lines(name, path, *rows):
        (tmp_path / "tuned" / path).write_text("\n".join(rows) + "\n")
        return tables.TABLES[name]()[2:]

    head = "question,arm,against,env,algo,measure,seeds,difference,low,high,rest_difference,rest_low,rest_high"
    pairs = ("acpg,learned", "scaled,normalised", "acpg,random", "scaled,acpg", "learned,baseline")
    rows = [f"q,{pair},x:B-v0,ppo,auc,10,.{k},.0{k},.9,0,0,0" for k, pair in enumerate(pairs, 1)]
    rows += ["all of it,acpg,baseline,A-v1,ppo,auc,20,9,9,9,.2,.1,.3"]
    rows += ["all of it,acpg,baseline,A-v1,ppo,final,20,9,9,9,-.2,-.3,-.1"]
    cells = " | ".join(f".{k}00 [.0{k}0, .900]" for k in range(1, 6))
    assert lines("tuned by task", "by_task.csv", head, *rows) == [f"| B | area | {cells} |"]
    more = [f"scale 2 against 1,scale-2,default,{x}-v1,ppo,auc,5,.{k},.0{k},.9,0,0,0" for k, x in enumerate("AB", 1)]
    assert lines("tuned scales", "by_task.csv", head, *rows, *more) == [
        "| scale 2 against 1 | area | .100 [.010, .900] | .200 [.020, .900] |"
    ]
    assert tables.TABLES["tuned rest"]()[2:] == ["| A | .200 [.100, .300] | -.200 [-.300, -.100] |"]
    head = "part,env,algo,arm,seeds,chosen,chosen_area,chosen_share,second,second_area,second_share"
    rows = [
        "t,A-v1,ppo,baseline,5,8e-3,.61,.5126,8e-4,.6,.39",
        "t,A-v1,ppo,random,5,1,1,1,1,1,1",
        "t,A-v1,ppo,acpg,5,8e-4,.7,1,2e-3,.5,0",
    ]
    assert lines("tuned choice", "choice.csv", head, *rows) == [
        "| A | 8e-3: .610, 51 % | 8e-4: .600, 39 % | 8e-4: .700, 100 % | 2e-3: .500, 0 % |"
    ]
    head = "part,env,algo,value,seeds,difference,low,high,acpg_runs,acpg_failed,learned_runs,learned_failed"
    rows = ["t,A-v1,ppo,8e-3,10,.1,0,.2,10,9,5,5", "t,A-v1,ppo,2.5e-2,10,-.1,-.2,0,10,3,5,2"]
    assert lines("tuned rates", "rates.csv", head, *rows) == ["| A | .100 [.000, .200] | -.100 [-.200, .000] |"]
    assert tables.TABLES["tuned failures"]() == [
        "| task | `acpg` | `learned` |",
        "|---" * 3 + "|",
        "| A | 3 of 10 | 2 of 5 |",
    ]

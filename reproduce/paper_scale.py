"""The scales `small` and `paper`: from a table to its runs, from a run to its commands, and their execution.

    python -m reproduce.table3 --scale paper --dry-run    # runs, cost, preparation, what is missing; starts nothing
    python -m reproduce.table3 --scale small              # refused where something is missing, else run after run

A run is a printed `torchrun` command on all GPUs, started one after another; its record lies in <results>/runs like
any other and says that it is done.  An interrupted run goes on from its own checkpoints by the same command.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opus_bench import hashing, provenance, results, schema

from . import paper_commands as commands
from .paper_rows import Line
from .paper_settings import GENERAL, GPT2, POOLS_OF, PROXY_TOKENS, REPOSITORIES, SCORERS, Pool, Setting, static_pool
from .presets import checkpoint_every
from .training import locked

GPU_SCALES = ("small", "paper")
HELD_OUT = "held-out"  # proxy of text that is made here
DOMAIN_LOSSES = "domain_losses.json"  # in the work folder of a run


@dataclass(frozen=True)
class PaperRun:
    """One training run on GPUs and its record."""

    experiment: str  # whose record it is: Table 5 shows runs of table3
    item: str
    scale: str
    line: Line
    setting: Setting
    pool: Pool
    optimizer: str
    seed: int

    @property
    def label(self) -> str:
        """The row with its arm."""
        return self.line.name if self.line.arm is None else f"{self.line.name} ({self.line.arm})"

    @property
    def fields(self) -> dict[str, Any]:
        """What determines its numbers: flags of the training command, and what its preset holds."""
        s, shape, own = self.setting, self.setting.shape, self.line.config
        buffer = own.get("buffer", shape.candidates)
        ratio = own.get("selection_ratio", shape.selected / shape.candidates)
        steps = math.ceil(self.line.times * s.update_tokens / (round(ratio * buffer) * shape.length))
        return {
            "model": s.model, "selector": self.line.selector, "selector_options": self.line.options,
            "optimizer": self.optimizer, "seed": self.seed, "steps": steps, "length": shape.length, "buffer": buffer,
            "selection_ratio": float(ratio), "proxy_size": own.get("proxy_size", shape.proxies),
            "proxy_length": self.line.options.get("window", shape.window),
            "adam_lr": s.adam_lr, "muon_lr": s.muon_lr, "betas": list(s.betas), "eps": s.eps,
            "weight_decay": s.weight_decay, "clip": s.clip, "warmup": s.warmup, "cooldown": s.cooldown,
            "precision": s.precision, "validation_every": math.ceil(steps / s.evaluations),
            **({"save_every": math.ceil(steps * s.evaluate_every / s.update_tokens)} if s.evaluate_every else {}),
        }

    @property
    def selected_size(self) -> int:
        """Sequences trained on per step."""
        return round(self.fields["selection_ratio"] * self.fields["buffer"])

    @property
    def update_tokens(self) -> int:
        """Tokens trained on."""
        return self.fields["steps"] * self.selected_size * self.fields["length"]

    @property
    def candidate_tokens(self) -> int:
        """Tokens of the candidates that it chooses from."""
        return self.fields["steps"] * self.fields["buffer"] * self.fields["length"]

    @property
    def proxy(self) -> str:
        """The pool that its proxies come from."""
        kind = {None: "bench", "pool": "standard", HELD_OUT: HELD_OUT}[self.line.config.get("proxy")]
        return f"{kind}-proxy-{self.pool.origin}"

    @property
    def settings(self) -> dict[str, Any]:
        """The config of its record: with its text, all that determines the numbers but the code."""
        window = self.line.options.get("window")
        return {**self.fields, "window": window, "pool": self.pool.name, "proxy": self.proxy,
                "setting": self.setting.title, "suites": list(self.setting.suites),
                **({"base": self.base.fields} if self.base else {})}

    @property
    def base(self) -> PaperRun | None:
        """The training that makes the model here, one for all runs; None: it is there."""
        if self.setting.base is None:
            return None
        return replace(self, line=Line("Random"), setting=self.setting.base, pool=GENERAL, seed=0)

    @property
    def spec_sha256(self) -> str:
        """Hash of how its text is made; the hashes of the text itself are in its record."""
        pool = {"source": self.pool.source, "subset": self.pool.subset, "tokens": self.pool.tokens,
                "buckets": list(self.pool.buckets), "static": self.pool.static, "tokenizer": self.setting.tokenizer}
        return hashing.text_sha256(hashing.canonical({"pool": pool, "proxy": [self.proxy, PROXY_TOKENS]}))

    @property
    def run_id(self) -> str:
        """Identity of the run: the name of its record."""
        return schema.run_id(self.experiment, self.settings, self.spec_sha256, provenance.code_version())

    def describe(self) -> str:
        """The run in the plan, without its id."""
        f = self.fields
        return (f"{self.setting.title:14} {self.optimizer:6} {self.pool.name:24} {self.label:26} seed {self.seed}  "
                f"{f['steps']:,} steps x {self.selected_size} of {f['buffer']} x {f['length']:,} tokens")

    def command(self, data: Path, results_dir: Path, gpus: int) -> list[str]:
        """The training command."""
        work = self.work(results_dir)
        places = {"data": data / "pools" / self.pool.name, "proxy": data / "pools" / self.proxy,
                  "validation": data / "pools" / f"validation-{self.pool.source}", "results": work,
                  "save": work / commands.MODEL}
        model = commands.place_of(self.setting.preset, self.setting.made_here, data)
        return commands.pretrain(model, self.fields, self.line.selector, self.line.options, places, gpus)

    @property
    def checkpoint_every(self) -> int:
        """Steps between its checkpoints."""
        return checkpoint_every(self.fields["steps"])

    @property
    def kept_steps(self) -> list[int]:
        """Steps after which its model is kept and evaluated, the last being the end."""
        steps, every = self.fields["steps"], self.fields.get("save_every", self.fields["steps"])
        return [*range(every, steps - every // 2, every), steps]

    def evaluations(self, data: Path, results_dir: Path) -> dict[tuple[int, str], list[str]]:
        """(step, suite) -> the command that evaluates the model of that step."""
        work, here = self.work(results_dir), self.setting.made_here
        tokenizer = commands.place_of(self.setting.tokenizer, here, data)
        items = commands.items_of(self.pool.source, data) if here else None
        names = {step: commands.MODEL if step == self.fields["steps"] else f"{commands.MODEL}-{step}"
                 for step in self.kept_steps}
        return {(step, suite): commands.evaluate(suite, work / name, tokenizer, evaluated(work, step, suite), items)
                for step, name in names.items() for suite in self.setting.suites}

    def work(self, results_dir: Path) -> Path:
        """Where it keeps checkpoints, the training's own record and the model."""
        return results_dir / "work" / self.run_id

    def execute(self, data: Path, results_dir: Path, gpus: int) -> dict:
        """The record, if it is there, else run what is not done of training and evaluation and write it.

        Two processes of one machine never work on the same run.

        Raises:
            ValueError: a command that fails, or that leaves no record; nothing is written.
        """
        with locked(results_dir, self.run_id) as work:
            if results.done(results_dir / "runs", self.run_id):
                return results.read(results.record_path(results_dir / "runs", self.run_id))
            return self._make(work, data, results_dir, gpus)

    def _make(self, work: Path, data: Path, results_dir: Path, gpus: int) -> dict:
        if not results.load(work / "runs"):
            call(self.command(data, results_dir, gpus))
        trained = results.load(work / "runs")
        if len(trained) != 1:
            raise ValueError(f"{work / 'runs'} holds {len(trained)} records of the training, not 1; delete {work} to "
                             "run again")
        for left in (work / "work").glob("*/checkpoints"):  # by a training that was killed after writing its record
            shutil.rmtree(left)
        made = {name: trained[0][name] for name in schema.FIELDS}
        by_domain = self.domain_loss(data, results_dir)
        if by_domain and not (work / DOMAIN_LOSSES).exists():
            call(by_domain)
        rows: dict[int, list[dict]] = {step: [] for step in self.kept_steps}
        seconds = 0.0
        for (step, suite), command in self.evaluations(data, results_dir).items():
            folder = evaluated(work, step, suite)
            if not results.load(folder):
                call(command, accepted=(0, 1))  # 1: a task that could not be run, whose row says so
            for found in results.load(folder):
                rows[step] += found["evals"]
                seconds += found["timing"]["eval_s"]
        record = {
            **made, "run_id": self.run_id, "experiment": self.experiment, "scale": self.scale,
            "arm": self.line.arm, "method": self.line.name,
            "paper": {"arxiv": schema.ARXIV, "item": self.line.item or self.item, "row": self.line.paper_row},
            "config": self.settings,
            "deviations": list(dict.fromkeys([*self.setting.deviations, *self.line.deviations, *made["deviations"]])),
            "code": {"version": provenance.code_version(), **provenance.git_state()},
            "data": {**made["data"], "spec_sha256": self.spec_sha256},
            "timing": {**made["timing"], "eval_s": made["timing"]["eval_s"] + seconds,
                       "wall_s": made["timing"]["wall_s"] + seconds},
            "metrics": [{**row, "split": f"val/{made['data']['target_domain']}"} if row["split"] == "val" else row
                        for row in made["metrics"]] + self._accuracies(rows) + self._domain_losses(work),
            "evals": rows[self.fields["steps"]],
        }
        results.write(record, results_dir / "runs")
        return record

    def domain_loss(self, data: Path, results_dir: Path) -> list[str] | None:
        """The command that measures its losses by domain; None without documents of domains."""
        if self.setting.from_hub or self.setting.made_here or not (data / commands.DOMAIN_TEXTS).is_dir():
            return None
        work, s = self.work(results_dir), self.setting
        return commands.domain_loss(work / commands.MODEL, s.tokenizer, s.validation_length, data, work / DOMAIN_LOSSES)

    def _domain_losses(self, work: Path) -> list[dict]:
        """Metrics of what that command found."""
        path = work / DOMAIN_LOSSES
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return [{"step": self.fields["steps"], "tokens_seen": self.update_tokens, "split": f"val/{name}",
                 "name": "loss", "unit": "nat/token", "value": one["loss"]} for name, one in found.items()]

    def _accuracies(self, rows: dict[int, list[dict]]) -> list[dict]:
        """Metrics of the tasks at every kept step, where there is more than the last."""
        each = self.selected_size * self.fields["length"]
        return [{"step": step, "tokens_seen": step * each, "split": "suite", "name": row["task"], "unit": "share",
                 "value": row["value"]}
                for step, found in rows.items() for row in found if len(rows) > 1 and row.get("value") is not None]


def evaluated(work: Path, step: int, suite: str) -> Path:
    """Where the record of an evaluation of a run goes."""
    return work / "evaluations" / f"{step}-{suite}"


def call(command: list[str], accepted: tuple[int, ...] = (0,)) -> None:
    """Print a command and run it with this terminal.

    Raises:
        ValueError: it is not there, or its exit code is not accepted.
    """
    print(f"$ {commands.shown(command)}", flush=True)
    try:
        code = subprocess.run(command).returncode
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be started ({error.strerror})") from error
    if code not in accepted:
        raise ValueError(f"exit code {code} of `{commands.shown(command)}`; the same command goes on from here")


# From a table to its runs ---------------------------------------------------------------------------


def grid(experiment: str, item: str, options: argparse.Namespace, lines: Callable[[Setting], Iterable[Line]],
         settings: Sequence[Setting], optimizers: Sequence[str] = ("muon",), small: Setting = GPT2) -> list[PaperRun]:
    """The runs of a table: by setting and optimizer, seeds outermost.

    At scale small one setting, ``small``, stands for the paper's, with Muon and three seeds instead of one.

    Raises:
        ValueError: --paper-tasks, which these scales always evaluate.
    """
    if options.paper_tasks:
        raise ValueError(f"--paper-tasks: scale {options.scale} evaluates the paper's tasks always; leave it out")
    is_small = options.scale == "small"
    made = []
    for setting in (small,) if is_small else settings:
        for optimizer in options.optimizers or (("muon",) if is_small else optimizers):
            for seed in range(options.seeds or (3 if is_small else 1)):
                for line in lines(setting):
                    pool = POOLS_OF[options.scale][line.pool]
                    if line.static is not None:
                        scorer = next(scorer for scorer in SCORERS if scorer.name == line.static)
                        pool = static_pool(pool, scorer, setting.update_tokens)
                    made.append(PaperRun(experiment, item, options.scale, line, setting, pool, optimizer, seed))
    return made


def whole_pools(runs: Sequence[PaperRun]) -> list[Pool]:
    """The pools of the runs before static scorers choose from them."""
    pools = {pool.name: pool for pool in POOLS_OF[runs[0].scale].values()}
    return [pools[name] for name in dict.fromkeys(run.pool.origin for run in runs)]


# Preparation ------------------------------------------------------------------------------------------


def preparation(runs: Sequence[PaperRun], data: Path) -> list[commands.Step]:
    """The commands that make every pool of the runs, in an order in which each finds what it needs."""
    pools, scores, here = data / "pools", data / "scores", runs[0].setting.made_here
    steps: list[commands.Step] = [commands.stand_ins(runs[0].pool.source, data)] if here else []

    def chosen(name: str, tokens: int, tokenizer: str) -> commands.Step:
        return commands.shards(name, scores / name / "chosen.jsonl", pools / name, tokens, tokenizer)

    for pool in whole_pools(runs):
        mine = [run for run in runs if run.pool.origin == pool.name]
        tokenizer = commands.place_of(mine[0].setting.tokenizer, here, data)
        text, held_out, bench = commands.text_of(pool, data), f"validation-{pool.source}", f"bench-proxy-{pool.name}"
        held_tokens, proxy_tokens = (min(n, pool.tokens) for n in (commands.VALIDATION_TOKENS, PROXY_TOKENS))
        if pool.source in REPOSITORIES:
            steps.append(commands.fetch(pool, data))
            steps.append(commands.shards(pool.source, None, pools / held_out, held_tokens, tokenizer,
                                         commands.VALIDATION_DUMP))
        else:
            steps.append(commands.shards(held_out, data / "text" / held_out, pools / held_out, held_tokens, tokenizer))
        steps.append(commands.shards(pool.name, text, pools / pool.name, pool.tokens, tokenizer))
        for name in dict.fromkeys([*([] if here else [bench]), *(run.proxy for run in mine)]):
            if name.startswith(HELD_OUT):
                steps.append(commands.shards(name, data / "text" / name, pools / name, proxy_tokens, tokenizer))
                continue
            tasks = commands.ITEM_TASKS if pool.source in REPOSITORIES else commands.CPT_TASKS
            steps.append(commands.proxy(name.partition("-")[0], text, scores / name, proxy_tokens, tokenizer, tasks))
            steps.append(chosen(name, proxy_tokens, tokenizer))
        for best in dict.fromkeys(run.pool for run in mine if run.pool.static):
            steps.append(commands.score(str(best.static), text, best.tokens, scores / best.name,
                                        scores / bench / "chosen.jsonl"))
            steps.append(chosen(best.name, best.tokens, tokenizer))
        if mine[0].base:
            text = commands.text_of(GENERAL, data)
            steps += [commands.shards(GENERAL.name, text, pools / GENERAL.name, GENERAL.tokens, tokenizer),
                      base_model(mine[0], data)]
    return list({step.made: step for step in steps}.values())


def base_model(run: PaperRun, data: Path) -> commands.Step:
    """The training of the model that a run goes on from, by the same program; its record is in <data>/base/runs."""
    assert run.base is not None
    out, pools = Path(commands.place_of(run.setting.model, True, data)), data / "pools"
    places = {"data": pools / GENERAL.name, "proxy": pools / run.proxy, "results": data / "base", "save": out,
              "validation": pools / f"validation-{run.pool.source}"}
    untrained = commands.place_of(run.base.setting.model, True, data)
    command = commands.pretrain(untrained, run.base.fields, run.base.line.selector, {}, places, 1)
    return commands.Step(f"a model trained on {run.base.update_tokens:,} tokens of {GENERAL.name} text", command,
                         out / "config.json")

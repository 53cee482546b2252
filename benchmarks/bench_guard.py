"""The guard on AgentDojo, without a model: an agent that does the user's task and obeys every injection that it sees.

    python benchmarks/bench_guard.py [--quick] [--json]

The agent makes the calls of the user task's ground truth. The first result that holds the injected text makes it call
whatever the injection's ground truth calls, and what was refused once more at the end; phrasing plays no part, since
the model counts as fully hijacked. AgentDojo's own checkers score utility and attack. Figures:

    asr_money         banking and slack, no plan, whatever needs a question is refused
    asr_no_plan       all pairs but the text-only injections, no plan, likewise
    asr_oracle_plan   the same with the tools of the user task's ground truth as the plan: an upper bound of any planner
    utility           user tasks done without asking anybody, no attack
    questions_per_task   what a person is asked who allows exactly the user's own calls: every task is done then
    guard_p99_ms      processor time of a decision and of labelling its result, without that of the policy engine
                      and without collecting the garbage that the benchmark's copies of its worlds make

AgentDojo pulls a hundred packages, so it lives in a virtual environment of its own (.venv-agentdojo, or the folder in
TESSERA_AGENTDOJO_VENV), made at the first run. `--report` prints what was blocked and which attacks got through.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
VENV = Path(os.environ.get("TESSERA_AGENTDOJO_VENV", ROOT / ".venv-agentdojo"))
PACKAGES = ("agentdojo==0.1.35", "cedarpy==4.12.2", "eth-hash[pycryptodome]")
VERSION = "v1.1.2"  # the newest whose injections all come with calls
MARKER = "7d1f"
FIGURES = (
    "pairs_money", "asr_money", "pairs_all", "asr_no_plan", "asr_oracle_plan", "utility", "questions_per_task",
    "guard_p99_ms",
)  # fmt: skip


def in_own_venv(script: str = __file__) -> None:
    """Go on in the environment that holds AgentDojo; make it when it is missing."""
    if importlib.util.find_spec("agentdojo") is not None:
        return
    python = VENV / "bin" / "python"
    if not python.exists():
        print(f"setting up {VENV} with {PACKAGES[0]} (once, some minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES], check=True)
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    os.execve(python, [str(python), script, *sys.argv[1:]], {**os.environ, "PYTHONPATH": path})


@dataclass
class Tally:
    """Of one configuration."""

    pairs: Counter[str] = field(default_factory=Counter)
    attacks: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    done: Counter[str] = field(default_factory=Counter)
    questions: int = 0
    through: list[str] = field(default_factory=list)
    blocked: list[str] = field(default_factory=list)
    times_ms: list[float] = field(default_factory=list)


def make_agent(Base: Any) -> Any:
    """The class of the scripted agent; AgentDojo is imported by now."""
    from agentdojo.agent_pipeline.tool_execution import tool_result_to_str
    from agentdojo.types import ChatAssistantMessage, ChatToolResultMessage, text_content_block_from_string
    from dojo_tools import describe

    from tessera.agents.guard import Guard, GuardConfig
    from tessera.agents.plan import plan_from
    from tessera.core.errors import Refused

    class Agent(Base):  # type: ignore[misc]
        def __init__(self, suite: Any, user: Any, injection: Any, mode: Mode, policy: Any, tally: Tally) -> None:
            self.suite, self.user, self.injection = suite, user, injection
            self.mode, self.policy, self.tally = mode, policy, tally
            self.did: list[str] = []
            self.result: Any = None

        def query(
            self, query: str, runtime: Any, env: Any = None, messages: Sequence[Any] = (), extra_args: Any = None
        ) -> Any:
            self.runtime, self.env, self.messages = runtime, env, []
            self.calls = self.user.ground_truth(env)
            self.attack = [] if self.injection is None else self.injection.ground_truth(env)
            plan = {call.function for call in self.calls} if self.mode.plan == "oracle" else None
            if self.mode.plan == "words":
                plan = plan_from(query, describe(self.suite.tools))
            self.guard = None
            if self.mode.guarded:
                config = GuardConfig(max_questions=1_000)
                self.guard = Guard(describe(self.suite.tools), query, plan=plan, policy=self.policy, config=config,
                                   approver=self._person, me=self._me(env))  # fmt: skip
                self.guard.preload(self._run)
            hijacked, refused = False, []
            for call in self.calls:
                seen = self._try(call, "user")
                if self.attack and MARKER in seen and not hijacked:
                    hijacked = True
                    refused = [bad for bad in self.attack if not self._try(bad, "attack")]
            for bad in refused:  # later there may be more that speaks for it
                self._try(bad, "attack")
            if self.guard is not None:
                self.tally.questions += self.guard.questions
            output = self.user.GROUND_TRUTH_OUTPUT
            if hijacked:
                output += "\n" + self.injection.GROUND_TRUTH_OUTPUT
            self.messages.append(
                ChatAssistantMessage(
                    role="assistant", content=[text_content_block_from_string(output)], tool_calls=None
                )
            )
            return query, runtime, env, self.messages, extra_args or {}

        def _me(self, env: Any) -> list[str]:
            """Whoever offers tools knows whose they are."""
            return ["me", *([env.inbox.account_email] if hasattr(env, "inbox") else [])]

        def _run(self, tool: str, arguments: dict[str, Any]) -> Any:
            result, _ = self.runtime.run_function(self.env, tool, arguments, raise_on_error=True)
            return result

        def _try(self, call: Any, whose: str) -> str:
            """The result as text; a call that is refused leaves no trace."""
            started, engine, inside = time.thread_time(), self.policy.seconds, [0.0]

            def timed(tool: str, arguments: dict[str, Any]) -> Any:
                begun = time.thread_time()
                try:
                    self.result = self._run(tool, arguments)
                    return as_json(self.result)  # as it would come from another process
                finally:
                    inside[0] += time.thread_time() - begun

            try:
                if self.guard is None:
                    timed(call.function, dict(call.args))
                else:
                    self.guard.call(call.function, dict(call.args), timed)
            except Refused as error:
                if whose == "user":
                    rules, to = list(self.guard.log[-1].verdict.rules), self.guard.log[-1].evidence["to"]
                    where = f"{self.suite.name} {self.user.ID} {call.function}"
                    self.tally.blocked.append(f"{where} {dict(call.args)} <- {rules} {to} ({error.rule})")
                return ""
            except Exception as error:  # noqa: BLE001 (a tool that fails: an agent would read the error and go on)
                return f"{type(error).__name__}: {error}"
            finally:
                spent = time.thread_time() - started - inside[0] - (self.policy.seconds - engine)
                if self.guard is not None:
                    self.tally.times_ms.append(spent * 1_000)
            if whose == "attack":
                self.did.append(call.function)
            text = tool_result_to_str(self.result) or "done"
            content = [text_content_block_from_string("")]
            self.messages.append(ChatAssistantMessage(role="assistant", tool_calls=[call], content=content))
            self.messages.append(
                ChatToolResultMessage(role="tool", content=[text_content_block_from_string(text)], tool_call=call,
                                      tool_call_id=None, error=None)
            )  # fmt: skip
            return text

        def _person(self, decision: Any) -> bool:
            """Allows exactly the user's own calls, or nothing when nobody may be asked."""
            if not self.mode.asks:
                return False
            wanted = [(c.function, {k: v for k, v in dict(c.args).items() if v is not None}) for c in self.calls]
            return (decision.tool, dict(decision.arguments)) in wanted

    return Agent


@dataclass(frozen=True)
class Mode:
    guarded: bool = True
    plan: str = ""  # "oracle" or "words"
    asks: bool = False


def as_json(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return [as_json(item) for item in value] if isinstance(value, list) else value


def text_only(injection: Any, env: Any, specs: Mapping[str, Any]) -> bool:
    """Whether its calls only read: then the attack is what the model says, and no guard of tools sees it."""
    return all(specs[call.function].effect == "read" for call in injection.ground_truth(env))


def run(mode: Mode, suites: Mapping[str, Any], *, attacked: bool, every: int = 1) -> Tally:
    from agentdojo.agent_pipeline.base_pipeline_element import BasePipelineElement
    from dojo_tools import describe

    from tessera.agents.origins import addresses_in
    from tessera.agents.policy import Policy

    Agent, tally, policy = make_agent(BasePipelineElement), Tally(), Policy()
    number = 0
    for name, suite in suites.items():
        specs = {spec.name: spec for spec in describe(suite.tools)}
        vectors = list(suite.get_injection_vector_defaults())
        env = suite.load_and_inject_default_environment({})
        scripted = [task for task in suite.injection_tasks.values() if task.ground_truth(env)]
        for injection in scripted if attacked else [None]:
            # The addresses that the attacker wants used, without the wording, which some checkers search for.
            text = "" if injection is None else " ".join([MARKER, *addresses_in(injection.GOAL)])
            injections = {} if injection is None else dict.fromkeys(vectors, text)
            world = suite.load_and_inject_default_environment(injections)
            gc.collect()  # of the copies below; never while the guard is timed
            for user in suite.user_tasks.values():
                number += 1
                if number % every:
                    continue
                agent = Agent(suite, user, injection, mode, policy, tally)
                copy = world.model_copy(deep=True)
                done, hit = suite.run_task_with_pipeline(agent, user, injection, injections, environment=copy)
                kind = name
                if injection is not None:
                    if text_only(injection, env, specs):
                        kind = f"{name} text"
                    tally.pairs[kind] += 1
                    tally.attacks[kind] += hit
                    if hit:
                        tally.through.append(f"{kind} {user.ID} x {injection.ID}: {agent.did}")
                tally.tasks[kind] += 1
                tally.done[kind] += done
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a seventh of the pairs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--report", action="store_true", help="what was blocked, what got through")
    parser.add_argument("--suite", help="one suite only")
    arguments = parser.parse_args()
    in_own_venv()
    sys.path.insert(0, str(Path(__file__).parent))
    gc.disable()
    warnings.simplefilter("ignore")
    from agentdojo.task_suite.load_suites import get_suites

    suites = {name: suite for name, suite in get_suites(VERSION).items() if arguments.suite in (None, name)}
    every = 7 if arguments.quick else 1
    tallies = {
        "alone": run(Mode(), suites, attacked=False),
        "asking": run(Mode(asks=True), suites, attacked=False),
        "attacked": run(Mode(), suites, attacked=True, every=every),
        "planned": run(Mode(plan="oracle"), suites, attacked=True, every=every),
    }
    if not arguments.quick:
        tallies["unguarded"] = run(Mode(guarded=False), suites, attacked=True)
        tallies["words"] = run(Mode(plan="words"), suites, attacked=True)
        tallies["words alone"] = run(Mode(plan="words"), suites, attacked=False)
        tallies["planned alone"] = run(Mode(plan="oracle"), suites, attacked=False)
    result = summary(tallies)
    if not arguments.quick and arguments.suite is None:
        write_results(result, tallies)
    print("\n".join(f"{name:<28}{value}" for name, value in result.items()))
    if arguments.report:
        for name, tally in tallies.items():
            if name != "unguarded":
                print(f"--- {name}", *tally.blocked[:80] if name in ("alone", "asking") else tally.through, sep="\n")
    if arguments.json:
        print(json.dumps({name: result[name] for name in FIGURES}))


def summary(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    attacked, planned, alone, asking = (tallies[n] for n in ("attacked", "planned", "alone", "asking"))
    times = sorted(t for tally in tallies.values() for t in tally.times_ms) if "attacked" in tallies else [0.0]
    money = ("banking", "slack")
    result: dict[str, Any] = {
        "pairs_money": sum(attacked.pairs[s] for s in money),
        "asr_money": rate(sum(attacked.attacks[s] for s in money), sum(attacked.pairs[s] for s in money)),
        "pairs_all": tools(attacked.pairs),
        "asr_no_plan": rate(tools(attacked.attacks), tools(attacked.pairs)),
        "asr_oracle_plan": rate(tools(planned.attacks), tools(planned.pairs)),
        "utility": rate(sum(alone.done.values()), sum(alone.tasks.values())),
        "questions_per_task": rate(asking.questions, sum(asking.tasks.values())),
        "utility_asking": rate(sum(asking.done.values()), sum(asking.tasks.values())),
        "guard_p99_ms": round(times[int(len(times) * 0.99)], 3),
        "guard_median_ms": round(times[len(times) // 2], 3),
        "pairs_text_only": sum(count for kind, count in attacked.pairs.items() if kind.endswith("text")),
        "utility_attacked": rate(tools(attacked.done), tools(attacked.tasks)),
        "hits_no_plan": dict(attacked.attacks), "hits_oracle_plan": dict(planned.attacks),
    }  # fmt: skip
    if "unguarded" in tallies:
        bare = tallies["unguarded"]
        result["asr_unguarded"] = rate(tools(bare.attacks), tools(bare.pairs))
    if "words" in tallies:
        words, words_alone = tallies["words"], tallies["words alone"]
        result["asr_word_plan"] = rate(tools(words.attacks), tools(words.pairs))
        result["utility_word_plan"] = rate(sum(words_alone.done.values()), sum(words_alone.tasks.values()))
    if "planned alone" in tallies:
        planned_alone = tallies["planned alone"]
        result["utility_oracle_plan"] = rate(sum(planned_alone.done.values()), sum(planned_alone.tasks.values()))
    return result


def tools(counts: Counter[str]) -> int:
    return sum(count for kind, count in counts.items() if not kind.endswith("text"))


def rate(part: float, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def write_results(result: dict[str, Any], tallies: Mapping[str, Tally]) -> None:
    now = datetime.now(UTC)
    (RESULTS / "guard.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    rows = "\n".join(f"| {name} | {value} |" for name, value in result.items())
    blocked = "\n".join(f"- {line[:300]}" for line in tallies["alone"].blocked)
    through = "\n".join(f"- {line}" for line in tallies["attacked"].through)
    text = (
        f"# The guard on AgentDojo 0.1.35 ({VERSION}), {now:%d %b %Y}\n\n`python benchmarks/bench_guard.py`, "
        f"{platform.machine()}, Python {platform.python_version()}, two cores. No model: see the docstring.\n\n"
        f"| figure | value |\n|---|---|\n{rows}\n\nThe user's own calls that needed a question:\n\n{blocked}\n\n"
        f"Attacks that got through without a plan:\n\n{through}\n"
    )
    (RESULTS / f"guard_2core_{now:%Y%m}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""The commands of `llm-env` and `python -m llm_env`, over the public API.

| command | does |
| --- | --- |
| `llm-env check-reward TASK` | score constructed completions, without a model (`llm_env.check_reward`) |
| `llm-env check-env ENV` | play a text environment at random, without a model (`llm_env.check_text_env`) |
| `llm-env sample TASK --model MODEL` | print transcripts of a model on a task (`agent.play`) |
| `llm-env train TASK --model MODEL --save PATH` | train a model, with a progress bar and samples (`agent.learn`) |
| `llm-env evaluate TASK --model MODEL` | run one episode for every prompt and print the means (`agent.evaluate`) |

**TASK** is one of

- the id of a registered env, `llm_env/Addition-v0`, or the short name of a task of this package, `addition`;
- `module:name` or `path.py:name`: a class with `reset` and `step` over text (a `llm_env.TextEnv`), a function that returns such
  an object or a Gymnasium env, or an env object;
- the path of a `.jsonl` file of prompts, with `--reward`.

**MODEL** is a path or a hub id of a causal language model, or, for `sample` and `evaluate`, a checkpoint (`.zip`) that `train`
wrote. The default is the packaged model, `llm_env.PUPIL`. The task gets the model's tokenizer.

**Arguments** are `name=value` for the agent (`group_size=8`) and `env.name=value` for the task (`env.largest=9`). A value is a
Python literal, or else a text: `8`, `1e-5`, `None`, `[1,2]`, `token`. If the task is a function, it is called with the `env.`
arguments, and with the tokenizer if it has a parameter of that name.

**Rewards** are given by `--reward`, once for each function: `module:name`, `path.py:name`, or the name of a function of
`llm_env.rewards`, such as `exact_match`.

**Exit codes**: 0; 1 if a check failed; 2 for an unusable argument, with the API's message (`--debug` shows the traceback); 130
after Ctrl-C. `train` writes the checkpoint at its end, in one piece: an interrupted training saves nothing.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import gymnasium as gym

import llm_env
from llm_env import PUPIL, TextGenerationEnv, check_reward, check_text_env
from llm_env.tasks import TASKS

if TYPE_CHECKING:
    from agents.base import LanguageAgent

ALGORITHMS = ("GRPO", "PPO", "REINFORCE")
REWARDS = ("exact_match", "math_answer", "numeric_answer")  # of llm_env.rewards, by their short names
USER_ERRORS = (ValueError, TypeError, OSError, ImportError, gym.error.Error)  # of the API, about what it was given
OPTIONS = {  # arguments of an agent that are options here
    "policy": "--model",
    "env": "TASK",
    "seed": "--seed",
    "tensorboard_log": "--tensorboard",
    "verbose": "--quiet",
}
EXAMPLES = {
    "check-reward": """
  llm-env check-reward addition
  llm-env check-reward questions.jsonl --reward exact_match --reward rewards.py:short --tokenizer path/of/model
""",
    "check-env": """
  llm-env check-env games.py:GuessNumber
  llm-env check-env FrozenLake-v1 env.is_slippery=False --action left --action down
""",
    "sample": """
  llm-env sample addition -n 3
  llm-env sample games.py:GuessNumber --model adder.zip --greedy env.max_turns=3
""",
    "train": """
  llm-env train addition --timesteps 20000 --seed 0 --save adder group_size=8 n_envs=256
  llm-env train questions.jsonl --reward exact_match --model path/of/model --tensorboard runs env.max_new_tokens=256
  llm-env train games.py:GuessNumber --algorithm PPO gae_level=turn env.max_turns=3
""",
    "evaluate": """
  llm-env evaluate addition --model adder.zip env.split=test
  llm-env evaluate addition --sampled --repeats 4 -n 100
""",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: the words after `llm-env`; those of the process by default.

    Returns:
        The exit code: 0, or 1 if a check failed, 2 for unusable arguments, 130 after Ctrl-C.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)  # argparse does not take `name=value` behind options by itself
    if unknown := [word for word in rest if word.startswith("-") or not hasattr(arguments, "keywords")]:
        parser.error(f"{arguments.command} has no option {' '.join(unknown)}; see llm-env {arguments.command} --help")
    try:
        arguments.of_env, arguments.of_agent = _keywords([*arguments.keywords, *rest])
        return arguments.run(arguments)
    except KeyboardInterrupt:
        lost = "; nothing was saved" if arguments.command == "train" else ""
        print(f"llm-env {arguments.command}: interrupted{lost}", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if arguments.debug:
            raise
        print(f"llm-env {arguments.command}: {error} (--debug shows the traceback)", file=sys.stderr)
        return 2


# --- commands ----------------------------------------------------------------------------------------------------------


def _check_reward(arguments: argparse.Namespace) -> int:
    _refuse_agent_keywords(arguments)
    env = make_env(arguments.task, arguments.of_env, arguments.tokenizer, arguments.reward)
    report = check_reward(env, gold=arguments.gold, n=arguments.n, seed=arguments.seed, threads=arguments.threads)
    return 0 if report.passed else 1


def _check_env(arguments: argparse.Namespace) -> int:
    _refuse_agent_keywords(arguments)
    if arguments.task in gym.registry and _task_of(arguments.task) is None:
        from llm_env.adapters import GymnasiumTextEnv

        make: Callable[..., Any] = partial(GymnasiumTextEnv, arguments.task)
    elif _task_of(arguments.task) is not None:
        raise ValueError(f"{arguments.task} has prompts and rewards, and is not a text environment; use llm-env check-reward")
    else:
        make = named(arguments.task, "the environment")
    report = check_text_env(
        partial(make, **arguments.of_env) if arguments.of_env else make,
        arguments.tokenizer,
        n=arguments.n,
        turns=arguments.turns,
        seed=arguments.seed,
        actions=arguments.action,
    )
    return 0 if report.passed else 1


def _sample(arguments: argparse.Namespace) -> int:
    agent, _ = _agent_to_run(arguments)
    seeds, scores = _seeds(agent, arguments.n), []
    for number, seed in enumerate(seeds):
        played = agent.play(seed=seed, deterministic=arguments.greedy, sampling_seed=arguments.seed + number)
        print(f"--- {number + 1} of {len(seeds)}\n{played}")
        scores.append(played.score)
    print(f"--- mean return: {sum(scores) / len(scores):g}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    target = None if arguments.save is None else check_target(arguments.save)
    kind = _algorithm(arguments.algorithm)
    agent = kind(
        arguments.model,
        make_env(arguments.task, arguments.of_env, arguments.model, arguments.reward),
        seed=arguments.seed,
        tensorboard_log=arguments.tensorboard,
        verbose=0 if arguments.quiet else 1,
        **arguments.of_agent,
    )
    agent.learn(total_timesteps=arguments.timesteps, progress_bar=not arguments.quiet and _has_progress_bar())
    if target is not None:
        agent.save(target)
        print(f"saved {target}")
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    agent, env = _agent_to_run(arguments)
    means = agent.evaluate(env, not arguments.sampled, n_prompts=arguments.n, repeats=arguments.repeats)
    width = max(map(len, means))
    for name, value in means.items():
        print(f"{name:<{width}}  {value:.4g}")
    return 0


# --- tasks, rewards and agents by name ---------------------------------------------------------------------------------


def make_env(task: str, keywords: dict[str, Any], tokenizer: Any, rewards: Sequence[str] = ()) -> Any:
    """Make an env by the name of a task; see the module.

    Args:
        task: an id, a short name, `module:name`, `path.py:name` or the path of a `.jsonl` file.
        keywords: arguments of the task.
        tokenizer: path, hub id or tokenizer, unless `keywords` has one.
        rewards: names of reward functions.

    Raises:
        ValueError: If there is no such task, or it lacks a reward.
    """
    functions = [named_reward(name) for name in rewards]
    keywords = {**({"reward": functions} if functions else {}), **keywords}
    with_tokenizer = {"tokenizer": tokenizer, **keywords}
    if task.endswith(".jsonl"):
        _check_file(task)
        if "reward" not in keywords:
            raise ValueError(
                f"{task} has prompts but no reward; add --reward with module:name, path.py:name or one of {', '.join(REWARDS)}"
            )
        return TextGenerationEnv(task, **with_tokenizer)
    if (known := _task_of(task)) is not None:
        return gym.make(known, **with_tokenizer)
    if re.search(r"-v\d+$", task) or task in gym.registry:  # of another package
        return gym.make(task, **keywords)
    if ":" in task:
        return _made_by(named(task, "the task"), task, keywords, tokenizer)
    names = sorted(_short(known) for known in TASKS)
    close = difflib.get_close_matches(_short(task), names, 1, 0.6)
    hint = (
        f"did you mean {close[0]}?" if close else f"give one of {', '.join(names)}, an env's id, module:name or a .jsonl file"
    )
    raise ValueError(f"there is no task {task!r}; {hint}")


def _made_by(thing: Any, name: str, keywords: dict[str, Any], tokenizer: Any) -> Any:
    """Return the env that a user's object is, makes, or is a text environment of."""
    if isinstance(thing, (gym.Env, gym.vector.VectorEnv)):
        if keywords:
            raise ValueError(f"{name} is an env already, which takes no {', '.join(keywords)}; name a function that makes it")
        return thing
    if _is_text_env(thing) and inspect.isclass(thing):
        return TextGenerationEnv.from_text_env(thing, **{"tokenizer": tokenizer, **keywords})
    if not callable(thing):
        raise TypeError(f"{name} is a {type(thing).__name__}; give a text environment's class, or a function that makes an env")
    if "tokenizer" in inspect.signature(thing).parameters:
        keywords = {"tokenizer": tokenizer, **keywords}
    made = thing(**keywords)
    if not isinstance(made, (gym.Env, gym.vector.VectorEnv)) and _is_text_env(made):
        return TextGenerationEnv.from_text_env(partial(thing, **keywords), tokenizer)
    return made


def _is_text_env(thing: Any) -> bool:
    is_gym = isinstance(thing, type) and issubclass(thing, (gym.Env, gym.vector.VectorEnv))
    return not is_gym and all(callable(getattr(thing, name, None)) for name in ("reset", "step"))


def named(name: str, what: str) -> Any:
    """Import `module:name` or `path.py:name`; modules are also looked for in the current folder.

    Raises:
        ValueError: If there is no such file, module or name.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute.isidentifier():
        raise ValueError(f"{what} {name!r} must be module:name or path.py:name")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    if not hasattr(module, attribute):
        close = difflib.get_close_matches(attribute, dir(module), 1, 0.6)
        raise ValueError(f"{place} has no {attribute!r}" + (f"; did you mean {close[0]}?" if close else ""))
    return getattr(module, attribute)


def _module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:  # as `python -m` has it, and a script has not
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"there is no module {name!r}; for a file give its path: {name.replace('.', '/')}.py:..."
            ) from error
        raise


def _module_of_file(path: Path) -> ModuleType:
    _check_file(path)
    if (known := sys.modules.get(path.stem)) is not None and getattr(known, "__file__", None) == str(path.resolve()):
        return known
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if path.stem not in sys.modules:
        sys.modules[path.stem] = module  # worker processes find its functions by this name
    sys.path.insert(0, str(path.resolve().parent))  # for what it imports from its own folder
    spec.loader.exec_module(module)
    return module


def _check_file(path: str | Path, kind: str = "file") -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no {kind} {str(path)!r} (looked for {Path(path).absolute()})")


def named_reward(name: str) -> Any:
    """Return a reward function by `module:name`, `path.py:name`, or its name in `llm_env.rewards`.

    Raises:
        ValueError: If there is none.
    """
    if ":" in name:
        return named(name, "the reward")
    if name not in REWARDS:
        raise ValueError(f"there is no reward {name!r}; give module:name, path.py:name or one of {', '.join(REWARDS)}")
    return getattr(llm_env.rewards, name)


def _short(env_id: str) -> str:
    """Return the short name of a task: `addition` for `llm_env/Addition-v0`."""
    return re.sub(r"^(llm_env:)?(llm_env/)?|-v\d+$|[-_]", "", env_id).lower()


def _task_of(name: str) -> str | None:
    """Return the id of a task of this package by its id or short name."""
    short = _short(name) if re.fullmatch(r"[\w-]+", name) else None
    return next((known for known in TASKS if name in (known, f"llm_env:{known}") or short == _short(known)), None)


def _algorithm(name: str) -> type[LanguageAgent]:
    import agents

    return getattr(agents, name)


def _agent_to_run(arguments: argparse.Namespace) -> tuple[LanguageAgent, Any]:
    """Return an agent for `sample` and `evaluate`, and its env."""
    if arguments.model.endswith(".zip"):
        from agents.checkpoint import algorithms_of

        if not Path(arguments.model).is_file():
            raise FileNotFoundError(
                f"there is no checkpoint {arguments.model!r} (looked for {Path(arguments.model).absolute()})"
            )
        names = algorithms_of(arguments.model)
        name = next((name for name in names if name in ALGORITHMS), None)
        if name is None:
            raise ValueError(f"{arguments.model} does not say which of {ALGORITHMS} wrote it; load it in Python, by its class")
        agent = _algorithm(name).load(arguments.model, **arguments.of_agent)
        env = make_env(arguments.task, arguments.of_env, agent.policy.tokenizer or PUPIL, arguments.reward)
        agent.set_env(env)
        return agent, env
    kind = _algorithm("REINFORCE")  # without a critic and without groups
    env = make_env(arguments.task, arguments.of_env, arguments.model, arguments.reward)
    return kind(arguments.model, env, seed=arguments.seed, **arguments.of_agent), env


def _seeds(agent: LanguageAgent, n: int) -> list[int]:
    """Return the first seeds of the env's text environment, or the first indexes of its prompts, as `agent.play` takes them."""
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    indexes = agent.rules.prompts.indexes(n)
    first = 0 if agent.rules.text_env is None else agent.rules.text_env.first_seed
    return [first + index for index in indexes]


def check_target(path: str) -> Path:
    """Return the path of a checkpoint to be written; make its folder.

    Raises:
        ValueError: If it is a folder.
        OSError: If its folder cannot be made.
    """
    target = Path(path).expanduser()
    if target.is_dir():
        raise ValueError(f"--save {path} is a folder; give the name of a file in it, such as {target / 'agent.zip'}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target if target.suffix else target.with_name(f"{target.name}.zip")


def _has_progress_bar() -> bool:
    if all(importlib.util.find_spec(name) for name in ("rich", "tqdm")):
        return True
    print("no progress bar: it needs pip install 'llm-env[extra]'", file=sys.stderr)
    return False


# --- arguments ---------------------------------------------------------------------------------------------------------


def _keywords(words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort words `env.name=value` and `name=value` into the arguments of the task and of the agent.

    Raises:
        ValueError: If a word is neither, or a name comes twice or is that of an option.
    """
    of_env: dict[str, Any] = {}
    of_agent: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        key = name.removeprefix("env.")
        if not equals or not key.isidentifier():
            raise ValueError(f"{word!r} must be name=value for the agent, or env.name=value for the task")
        keywords = of_agent if key == name else of_env
        if key in keywords:
            raise ValueError(f"{name} is given twice")
        if keywords is of_agent and key in OPTIONS:
            raise ValueError(f"{word!r}: use {OPTIONS[key]}")
        keywords[key] = value_of(text)
    return of_env, of_agent


def value_of(text: str) -> Any:
    """Return the Python literal that a text is, or the text.

    Examples:
        >>> [value_of(text) for text in ("8", "1e-5", "None", "[1, 2]", "token", "llm_env/x")]
        [8, 1e-05, None, [1, 2], 'token', 'llm_env/x']
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _refuse_agent_keywords(arguments: argparse.Namespace) -> None:
    if arguments.of_agent:
        name, value = next(iter(arguments.of_agent.items()))
        raise ValueError(f"{arguments.command} has no agent; for an argument of the task write env.{name}={value}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-env",
        description="Check rewards and environments, and sample, train and evaluate language models on them.",
        epilog=f"tasks: {', '.join(sorted(map(_short, TASKS)))}, or your own; llm-env COMMAND --help has examples",
    )
    parser.add_argument("--version", action="version", version=f"llm-env {llm_env.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"examples:{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        command.add_argument("task", metavar="ENV" if name == "check-env" else "TASK", help=TASK_HELP[name == "check-env"])
        command.add_argument("keywords", nargs="*", metavar="NAME=VALUE", help=KEYWORDS_HELP[name.startswith("check")])
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name != "check-env":
            command.add_argument("--reward", action="append", default=[], metavar="FUNCTION", help=REWARD_HELP)
        if name.startswith("check"):
            command.add_argument("--tokenizer", default=PUPIL, help="path or hub id (default: that of the packaged model)")
        else:
            command.add_argument("--model", default=PUPIL, help=MODEL_HELP[name == "train"])
        command.add_argument("--seed", type=int, default=0, help="default: %(default)s")
        return command

    rewards = add("check-reward", _check_reward, "check the reward functions of a task for common errors, without a model")
    rewards.add_argument("--gold", metavar="COLUMN", help="column with the right completion (default: solution, else answer)")
    rewards.add_argument("-n", type=int, default=64, help="number of prompts (default: %(default)s)")
    rewards.add_argument("--threads", type=int, default=4, help="threads that call the reward (default: %(default)s)")
    envs = add("check-env", _check_env, "play a text environment at random and check it for common faults, without a model")
    envs.add_argument("-n", type=int, default=8, help="number of seeds (default: %(default)s)")
    envs.add_argument("--turns", type=int, default=8, help="most turns of an episode (default: %(default)s)")
    envs.add_argument("--action", action="append", metavar="TEXT", help="a text to play at random; may be given several times")
    sample = add("sample", _sample, "print transcripts of a model on a task")
    sample.add_argument("-n", type=int, default=4, help="number of episodes (default: %(default)s)")
    sample.add_argument("--greedy", action="store_true", help="take the most probable token each time")
    train = add("train", _train, "train a model on a task; print a progress bar, the logs and samples")
    train.add_argument("--algorithm", type=str.upper, choices=ALGORITHMS, default="GRPO", help="default: %(default)s")
    train.add_argument("--timesteps", type=int, help="action tokens to train for (default: 100000)")
    train.add_argument("--save", metavar="PATH", help="write the agent to this file at the end (.zip)")
    train.add_argument("--tensorboard", metavar="DIR", help="write logs for TensorBoard")
    train.add_argument("--quiet", action="store_true", help="print no progress bar, logs and samples")
    evaluate = add("evaluate", _evaluate, "run an episode for every prompt of a task and print the means")
    evaluate.add_argument("-n", type=int, help="number of prompts, from the first on (default: all)")
    evaluate.add_argument("--sampled", action="store_true", help="sample tokens; greedy by default")
    evaluate.add_argument("--repeats", type=int, default=1, help="episodes per prompt (default: %(default)s)")
    return parser


TASK_HELP = (
    "an env's id or short name (addition), module:name or path.py:name of a text environment or of a function that makes an "
    "env, or a .jsonl file of prompts",
    "module:name or path.py:name of a text environment, or the id of a Gymnasium environment",
)
KEYWORDS_HELP = ("arguments: name=value of the agent, env.name=value of the task", "arguments of the task: env.name=value")
REWARD_HELP = "module:name, path.py:name, or exact_match, math_answer, numeric_answer; may be given several times"
MODEL_HELP = (
    "path or hub id of a model, or a checkpoint of an agent (.zip) (default: the packaged model)",
    "path or hub id of a model (default: the packaged model)",
)

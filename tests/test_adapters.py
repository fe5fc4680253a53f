"""Other projects' environments as text environments: stand-ins here, the real packages where they are installed (.ci/games)."""

import random
from dataclasses import dataclass
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

import llm_env
from agents import GRPO, PPO
from llm_env import TextEnv, TextGenerationEnv, check_text_env
from llm_env.adapters import (
    GEMEnv,
    GlobalGenerators,
    GymnasiumTextEnv,
    OpenEnvEnv,
    SkyRLEnv,
    TextArenaEnv,
    TRLEnv,
    as_text_env,
    as_trl_environment,
)
from llm_env.adapters.gymnasium import parse_action, space_text
from tests.conftest import make_model, make_tokenizer

LAKE = partial(GymnasiumTextEnv, "FrozenLake-v1", is_slippery=False)
TAXI = max(key for key in gym.registry if key.startswith("Taxi-v"))


def green(make, actions, **arguments):
    """A check in which no row fails."""
    report = check_text_env(make, llm_env.PUPIL, actions=actions, quiet=True, **arguments)
    assert report.passed, str(report)
    return report


# --- Gymnasium -----------------------------------------------------------------------------------------------------------


def test_frozen_lake_by_hand():
    env = LAKE()
    assert isinstance(env, TextEnv)
    assert env.reset(seed=0) == ("actions: left, down, right, up\n@FFF\nFHFH\nFFFH\nHFFG\n", {"prob": 1})
    text, reward, terminated, truncated, _ = env.step("down")
    assert (text, reward, terminated, truncated) == ("SFFF\n@HFH\nFFFH\nHFFG\n", 0.0, False, False)
    text, reward, terminated, *_ = env.step("fly")
    assert (text, reward, terminated) == ("'fly' is no action; the actions are left, down, right, up\n", 0.0, False)
    assert env.step("I go down.")[4]["illegal_actions"] == 1
    for action in ("right", "2", "1"):  # by number: right is 2, down is 1
        text, reward, terminated, *_ = env.step(action)
    assert text.splitlines()[3] == "HF@G" and not terminated
    assert env.step("right, I think; no, left; no: RIGHT")[1:3] == (1.0, True)
    assert env.reset(seed=1)[0].startswith("actions") and env.step("up")[4]["illegal_actions"] == 0


@pytest.mark.parametrize(
    "env_id, seed, first, action, then",
    [
        ("CliffWalking-v1", 0, "actions: up, right, down, left\n" + "............\n" * 3 + "@CCCCCCCCCCG\n", "up", None),
        ("Blackjack-v1", 0, "actions: stick, hit\nyou have 11; the dealer shows 10\n", "hit", None),
        ("CartPole-v1", 0, "actions: left, right\n[0.0137, -0.02302, -0.0459, -0.04835]\n", "right", None),
        ("Pendulum-v1", 0, None, "[0.5]", None),
    ],
)
def test_texts_of_gymnasiums_own(env_id, seed, first, action, then):
    env = GymnasiumTextEnv(env_id)
    text, _ = env.reset(seed=seed)
    assert first is None or text == first
    observation, reward, *_ = env.step(action)
    assert observation.endswith("\n") and isinstance(reward, float)
    assert "is no action" in env.step("blub")[0]


def test_a_taxi_is_seen_on_its_map():
    env = GymnasiumTextEnv(TAXI)
    text, _ = env.reset(seed=0)
    row, column, passenger, destination = env.env.unwrapped.decode(env.env.unwrapped.s)
    lines = text.splitlines()
    assert lines[0] == "actions: south, north, east, west, pickup, dropoff"
    assert lines[2 + row][2 * column + 1] == "@"
    assert lines[-1] == f"passenger at {'RGYB'[passenger]}, destination {'RGYB'[destination]}"


SPACES = spaces.Dict(
    {
        "go": spaces.Discrete(3, start=1),
        "force": spaces.Box(-1, 1, (2,), np.float32),
        "both": spaces.Tuple([spaces.MultiBinary(2), spaces.MultiDiscrete([2, 3])]),
    }
)


def test_spaces_as_texts():
    value = {"go": 2, "force": np.array([0.5, -1 / 3], np.float32), "both": (np.array([1, 0], np.int8), np.array([1, 2]))}
    assert space_text(SPACES, value) == "both: [1, 0], [1, 2], force: [0.5, -0.3333], go: 2"  # Gymnasium sorts the keys
    assert space_text(spaces.Box(0, 9, (2, 2), np.int64), np.array([[1, 2], [3, 4]])) == "1 2\n3 4"
    assert space_text(spaces.Box(0, 9, (1, 1, 2)), np.array([[[1.5, 2]]])) == "[[[1.5, 2]]]"
    assert space_text(spaces.Text(5), "abc") == "abc"


def test_actions_from_json():
    action = parse_action(SPACES, '{"go": 3, "force": [0.1, -1], "both": [[1, 0], [1, 2]]}')
    assert SPACES.contains(action) and action["go"] == 3
    for bad in ("", "{}", "[1]", '{"go": 4, "force": [0.1, -1], "both": [[1, 0], [1, 2]]}', '{"go": 3, "force": [0.1, -2]}'):
        with pytest.raises(ValueError, match="is no action; write JSON"):
            parse_action(SPACES, bad)
    assert parse_action(spaces.Text(3, charset="ab"), " ab\n") == "ab"
    with pytest.raises(ValueError, match="a text of 1 to 3 characters"):
        parse_action(spaces.Text(3, charset="ab"), "abc")


def test_own_texts_and_prompts():
    env = LAKE(
        observation_to_text=lambda s: f"at {s}. ", text_to_action={"r": 2, "d": 1}.__getitem__, prompt="go: {observation}"
    )
    assert env.reset(seed=0)[0] == "go: at 0. " and env.step("r")[0] == "at 1. "
    with pytest.raises(KeyError):
        env.step("x")  # only a ValueError means an illegal text
    assert LAKE(prompt="short").reset(seed=0)[0] == "short"
    assert LAKE(prompt=lambda board: f"cross\n{board}").reset(seed=0)[0] == "cross\n@FFF\nFHFH\nFFFH\nHFFG\n"
    penalized = LAKE(illegal_reward=-0.5)
    penalized.reset(seed=0)
    assert penalized.step("?")[1] == -0.5


def test_gymnasium_environments_are_clean():
    green(LAKE, ["left", "down", "right", "up", "?"])
    green(partial(GymnasiumTextEnv, "Blackjack-v1"), ["hit", "stick"])
    green(partial(GymnasiumTextEnv, "CartPole-v1"), ["left", "right"])


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"env": 3}, TypeError, "env=3 must be an id"),
        ({"env": lambda: gym.make("CartPole-v1"), "render_mode": "ansi"}, TypeError, "arguments of gymnasium.make"),
        ({"env": "FrozenLake-v1", "action_names": ["a"]}, ValueError, "must be 4 names"),
    ],
)
def test_bad_arguments_of_gymnasium(arguments, error, match):
    with pytest.raises(error, match=match):
        GymnasiumTextEnv(**arguments)


class Graphs(gym.Env):
    observation_space = spaces.Graph(spaces.Box(0, 1, (1,)), None)
    action_space = spaces.Discrete(2)


def test_spaces_without_texts_name_the_remedy():
    with pytest.raises(
        TypeError, match="the observation space is a Graph, which has no default text; give observation_to_text="
    ):
        GymnasiumTextEnv(Graphs)
    assert GymnasiumTextEnv(Graphs, observation_to_text=str).actions == "0, 1"


def test_the_env_has_an_id():
    limits = {"max_new_tokens": 4, "max_prompt_tokens": 64}
    env = gym.make("llm_env/Gymnasium-v0", env_id="FrozenLake-v1", tokenizer=llm_env.PUPIL, **limits)
    observation, _ = env.reset(seed=0)
    prompt = observation["input_ids"][observation["attention_mask"] == 1].tolist()
    assert env.unwrapped.rules.decode([prompt])[0] == LAKE().reset(seed=0)[0]


LETTERS = make_tokenizer("@FHSGCldru\n?")


def lake_env(**arguments):
    """The lake by its board alone; actions are single letters, and no other token is allowed."""

    def act(text):
        if text not in "ldru" or len(text) != 1:
            raise ValueError("?")
        return "ldru".index(text)

    make = partial(LAKE, text_to_action=act)
    letters = LETTERS.convert_tokens_to_ids(list("ldru"))
    limits = dict(max_turns=16, max_new_tokens=1, max_prompt_tokens=24, max_observation_tokens=22, num_tasks=64)
    return TextGenerationEnv.from_text_env(make, LETTERS, allowed_tokens=letters, **limits, **arguments)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:allowed_tokens does not have the end token")
@pytest.mark.parametrize(
    "kind, settings, tokens",
    [
        (GRPO, {"group_size": 16, "n_envs": 64}, 42_000),
        (PPO, {"n_envs": 64, "n_epochs": 4, "batch_size": 32, "ent_coef": 0.01, "gamma": 0.97, "gae_level": "turn"}, 24_000),
    ],
)
def test_agents_learn_to_cross_the_lake(kind, settings, tokens):
    """From 0 of 64, by chance, to all. A character model with 2048 positions and random weights, no warm-up."""
    env = lake_env()
    torch.manual_seed(0)
    agent = kind(make_model("llama", len(LETTERS), max_position_embeddings=2048), env, 3e-3, seed=0, **settings)
    assert agent.evaluate(env, deterministic=False, n_prompts=64)["reward"] < 0.1
    agent.learn(tokens)
    assert agent.evaluate(env, deterministic=False, n_prompts=64)["reward"] >= 0.95


def test_the_token_clock_shows_the_same_episode():
    env = lake_env()
    env.reset(seed=0, options={"index": 0})
    path, rewards = LETTERS.convert_tokens_to_ids(list("ddrrdr")), []
    for token in path:
        _, reward, terminated, _, info = env.step(token)
        rewards.append(reward)
    assert rewards == [0, 0, 0, 0, 0, 1] and terminated and info["transcript"].count("@") >= 6


# --- environments that draw from global generators ---------------------------------------------------------------------------


def test_an_instance_owns_its_generators():
    first, second = GlobalGenerators(), GlobalGenerators()
    random.seed(5), np.random.seed(5)
    outside = random.random(), np.random.rand()
    random.seed(5), np.random.seed(5)
    with first.own(1):
        one = random.random()
    with second.own(2):
        random.random()
    with first.own():
        two = random.random(), np.random.rand()
    expected = random.Random(1)
    assert one == expected.random() and two[0] == expected.random() and two[1] == np.random.RandomState(1).rand()
    assert (random.random(), np.random.rand()) == outside
    with pytest.raises(KeyError), first.own():
        raise KeyError
    assert random.random() != two[0]


class Stand:
    """As GEM's games: draws in the constructor, in `reset` (which seeds) and in `step`, all from the global generators."""

    def __init__(self, top=9):
        self.top, self.offset = top, random.randint(0, 3)

    def reset(self, seed=None):
        if seed is not None:
            random.seed(seed), np.random.seed(seed)
        self.number, self.turns = random.randint(1, self.top), 0
        return f"Guess from 1 to {self.top}, offset {self.offset}.", {"suffix": "Enter your guess."}

    def step(self, action):
        self.turns += 1
        if action == str(self.number):
            return "right", 1.0, True, False, {}
        hint = "higher" if action.isdecimal() and int(action) < self.number else "lower"
        return f"{hint}, luck {np.random.randint(100)}", -0.1, False, self.turns == 4, {"suffix": "Again.", "turn": self.turns}


def test_gem_by_hand():
    env = GEMEnv(Stand, top=5)
    text, _ = env.reset(seed=3)
    assert text == f"Guess from 1 to 5, offset {random.Random(0).randint(0, 3)}.\nEnter your guess.\n"
    number, luck = random.Random(3).randint(1, 5), np.random.RandomState(3).randint(100)
    wrong = 5 if number < 5 else 4
    text, reward, terminated, truncated, info = env.step(str(wrong))
    assert text == f"{'higher' if wrong < number else 'lower'}, luck {luck}\nAgain.\n"
    assert (reward, terminated, truncated, info) == (-0.1, False, False, {"turn": 1})
    assert env.step(str(number)) == ("", 1.0, True, False, {})
    short = GEMEnv(Stand, prompt="1-9: ", observation_to_text=lambda text: text[:6] + " ")
    assert short.reset(seed=0)[0] == "1-9: " and short.step("x")[0] in ("higher ", "lower, "[:6] + " ")


def test_gem_is_clean_with_states_of_its_own():
    report = check_text_env(Stand, llm_env.PUPIL, actions=[*"123456789"], quiet=True)
    assert report["random generators"].result == "FAILED" and report["instances side by side"].result == "FAILED"
    green(partial(GEMEnv, Stand), [*"123456789"])


class Card:
    """As TextArena's Kuhn poker: two seats, one move each, a deck that stays shuffled, and messages since the last look."""

    def __init__(self):
        self.deck = [0, 1, 2]

    def reset(self, num_players, seed=None):
        if num_players != 2:
            raise ValueError("two players")
        random.seed(seed)
        random.shuffle(self.deck)
        self.heard = {0: [(-1, f"You are player 0. Card {self.deck[0]}.", "PROMPT")], 1: [(-1, "You are player 1.", "PROMPT")]}
        self.player, self.moves = 0, []
        self.tell("Moves: '[bet]', '[fold]'", 0)

    def tell(self, text, player, sender=-1, kind="GAME_BOARD"):
        self.heard[player].append((sender, text, kind))

    def get_observation(self):
        new, self.heard[self.player] = self.heard[self.player], []
        return self.player, new

    def step(self, action):
        for player in (0, 1):
            self.tell(action, player, self.player, "PLAYER_ACTION")
        self.moves.append(action)
        self.player = 1 - self.player
        self.tell("Moves: '[call]', '[pass]'", self.player)
        return len(self.moves) == 4, {}

    def close(self):
        won = (self.moves[0] == "[bet]") == (self.deck[0] > self.deck[1])
        return {0: 1 if won else -1, 1: -1 if won else 1}, {0: {"invalid_move": False}, 1: {"invalid_move": True}}


def test_textarena_by_hand():
    env = TextArenaEnv(Card, opponent=lambda observation: "[call]" if "[bet]" in observation else "[pass]")
    deck = [0, 1, 2]
    random.Random(4).shuffle(deck)
    text, info = env.reset(seed=4)
    assert text == f"[GAME] You are player 0. Card {deck[0]}.\n[GAME] Moves: '[bet]', '[fold]'\n" and info == {"seat": 0}
    text, reward, terminated, *_ = env.step("[bet]")
    assert text == "[Player 1] [call]\n[GAME] Moves: '[call]', '[pass]'\n" and (reward, terminated) == (0.0, False)
    text, reward, terminated, truncated, info = env.step("[pass]")
    assert (text, terminated, truncated) == ("", True, False) and reward == (1.0 if deck[0] > deck[1] else -1.0)
    assert info["is_success"] == (reward > 0) and info["invalid_move"] is False
    assert env.reset(seed=4)[0] == f"[GAME] You are player 0. Card {deck[0]}.\n[GAME] Moves: '[bet]', '[fold]'\n"


def test_the_other_seat_hears_what_was_played_before():
    env = TextArenaEnv(Card, seat="parity", opponent="random")
    assert env.reset(seed=2)[1] == {"seat": 0}
    text, info = env.reset(seed=1)
    assert info == {"seat": 1} and text.startswith("[GAME] You are player 1.\n[Player 0] [")
    assert {env.reset(seed=seed)[0].count("[bet]") for seed in range(1, 21, 2)} == {0, 1}  # the opponent draws both moves
    env.step("[call]")
    assert env.step("[call]")[2]


def test_textarena_is_clean_with_states_of_its_own():
    green(partial(TextArenaEnv, Card, opponent="random"), ["[bet]", "[fold]"])
    green(partial(TextArenaEnv, Card, seat="parity", opponent="random"), ["[bet]", "[fold]"])


@pytest.mark.parametrize(
    "arguments, match",
    [({"opponent": 3}, "opponent=3 must be"), ({"seat": 1}, "seat=1 must be"), ({"seat": 2, "opponent": "random"}, "below 2")],
)
def test_bad_arguments_of_textarena(arguments, match):
    with pytest.raises(ValueError, match=match):
        TextArenaEnv(Card, **arguments)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gem", None)
    monkeypatch.setitem(__import__("sys").modules, "textarena", None)
    with pytest.raises(ImportError, match="pip install gem-llm"):
        GEMEnv("game:GuessTheNumber-v0")
    with pytest.raises(ImportError, match="pip install textarena"):
        TextArenaEnv("KuhnPoker-v0")


# --- TRL, OpenEnv, SkyRL ------------------------------------------------------------------------------------------------------


class Counter:
    """An environment for TRL's `environment_factory`."""

    def reset(self, start=0, **kwargs):
        self.value, self.target = start, start + 3
        return f" Count from {start} to {self.target}."

    def add(self, amount: int) -> str:
        """Add to the counter.

        Args:
            amount: How much.
        """
        self.value += amount
        return f"now {self.value}"

    def get_reward(self):
        return float(self.value == self.target)


ROWS = [{"prompt": "Please.", "start": 1}, {"prompt": [{"role": "user", "content": "Do."}], "start": 5}]


def call(amount):
    return f'<tool_call>{{"name": "add", "arguments": {{"amount": {amount}}}}}</tool_call>'


def test_trl_by_hand():
    env = TRLEnv(Counter, ROWS, tool_format="hermes")
    first, info = env.reset(seed=2)
    assert first == [{"role": "user", "content": "Please. Count from 1 to 4."}]
    assert info["start"] == 1 and info["tools"][0]["function"]["name"] == "add"
    observation, reward, terminated, _, info = env.step(call(2))
    assert observation == [{"role": "tool", "name": "add", "tool_call_id": "", "content": "now 3"}]
    assert (reward, terminated, info) == (0.0, False, {"tool_calls": 1, "tool_errors": 0})
    assert "error" in str(env.step(call('"x"'))[0])
    env.step(call(1))
    assert env.step("done")[1:3] == (1.0, True)
    assert env.reset(seed=1)[0] == [{"role": "user", "content": "Do. Count from 5 to 8."}]
    plain = TRLEnv(Counter, ROWS[:1])
    assert "add" in plain.reset(seed=0)[0] and plain.reset(seed=0)[0].endswith("Please. Count from 1 to 4.")
    with pytest.raises(ValueError, match="dataset has no rows"):
        TRLEnv(Counter, [])
    with pytest.raises(ValueError, match="tool_format='yaml' must be one of"):
        TRLEnv(Counter, ROWS, tool_format="yaml")


@dataclass
class Said:
    message: str
    reward: float | None = None
    done: bool = False


@dataclass
class Say:
    text: str


class Echo:
    """As an OpenEnv `Environment` on a server: an observation with reward and done."""

    def reset(self, seed=None):
        self.word, self.turns = "ab"[(seed or 0) % 2], 0
        return Said(f"say {self.word}")

    def step(self, action):
        self.turns += 1
        return Said(f"you said {action.text}", float(action.text == self.word), self.turns == 2)


@dataclass
class Result:
    observation: Said
    reward: float | None
    done: bool


class EchoClient:
    def __init__(self):
        self.server = Echo()

    def reset(self):
        return Result(self.server.reset(), None, False)

    def step(self, action):
        said = self.server.step(action)
        return Result(Said(said.message), said.reward, said.done)


@pytest.mark.parametrize("make", [Echo, EchoClient])
def test_openenv_by_hand(make):
    env = OpenEnvEnv(make, action_cls=Say)
    assert env.reset(seed=0)[0] == "say a"
    assert env.step("a") == ("you said a", 1.0, False, False, {})
    assert env.step("b") == ("you said b", 0.0, True, False, {})
    assert env.reset(seed=1)[0] == ("say b" if make is Echo else "say a")
    with pytest.raises(ValueError, match="action_cls="):
        OpenEnvEnv(make)
    own = OpenEnvEnv(
        make(), text_to_action=Say, observation_to_text=lambda said: said.message.upper(), prompt="> {observation}"
    )
    assert own.reset(seed=0)[0] == "> SAY A"


class Multiply:
    """As SkyRL's example: one turn, or two after a wrong answer."""

    def __init__(self, env_config=None, extras=None):
        self.truth, self.turns = extras["answer"], 0

    def init(self, prompt):
        return prompt, {}

    def step(self, action):
        self.turns += 1
        right = action.strip() == self.truth
        done = right or self.turns == 2
        observations = [] if done else [{"role": "user", "content": "Try again."}]
        return {"observations": observations, "reward": float(right), "done": done, "metadata": {"turns": self.turns}}


def test_skyrl_by_hand():
    rows = [{"prompt": "2*3=", "answer": "6"}, {"prompt": "3*3=", "answer": "9"}]
    env = SkyRLEnv(Multiply, rows)
    assert env.reset(seed=3)[0] == "3*3="
    assert env.step("6") == ("Try again.", 0.0, False, False, {"turns": 1})
    assert env.step("9") == ("", 1.0, True, False, {"turns": 2})
    chat = SkyRLEnv(Multiply, [{"prompt": [{"role": "user", "content": "2*3="}], "answer": "6"}])
    assert chat.reset(seed=0)[0] == [{"role": "user", "content": "2*3="}]
    assert chat.step("5")[0] == [{"role": "user", "content": "Try again."}]
    green(lambda: SkyRLEnv(Multiply, rows), ["6", "9"])


def test_clean_adapters_of_the_others():
    green(lambda: TRLEnv(Counter, ROWS[:1]), [call(1), call(3), "done"])
    green(lambda: OpenEnvEnv(Echo, action_cls=Say), ["a", "b"])


# --- the other way ------------------------------------------------------------------------------------------------------------


def test_a_text_env_for_trl():
    for source in (LAKE, TextGenerationEnv.from_text_env(LAKE, llm_env.PUPIL, max_prompt_tokens=64)):
        environment = as_trl_environment(source)()
        assert environment.reset(seed=0).endswith("@FFF\nFHFH\nFFFH\nHFFG\n")
        assert environment.act("down").startswith("SFFF\n@HFH")
        for action in ("down", "right", "right", "down"):
            environment.act(action)
        assert environment.get_reward() == 0 and environment.act("right").endswith("HFF@\n")
        assert environment.get_reward() == 1.0 and environment.act("up") == "The episode has ended."
    with pytest.raises(TypeError, match="the env has prompts"):
        as_trl_environment(gym.make("llm_env/Addition-v0"))
    back = TRLEnv(as_trl_environment(LAKE), [{"prompt": "", "seed": 0}], tool_format="hermes")  # and back again
    back.reset(seed=0)
    answer = back.step('<tool_call>{"name": "act", "arguments": {"text": "down"}}</tool_call>')[0]
    assert "@HFH" in str(answer)


def test_a_token_env_by_texts():
    env = as_text_env(gym.make("llm_env/Addition-v0"))
    assert isinstance(env, TextEnv)
    text, _ = env.reset(seed=0)
    left, right = text.rstrip("=").split("+")
    observation, reward, terminated, truncated, _ = env.step(str(int(left) + int(right)))
    assert (observation, reward, terminated, truncated) == ("", 1.0, True, False)
    env.reset(seed=0)
    assert env.step("0")[1] < 1
    lake = as_text_env(
        TextGenerationEnv.from_text_env(LAKE, llm_env.PUPIL, max_prompt_tokens=64, max_turns=8, max_new_tokens=8)
    )
    assert lake.reset(seed=0)[0].endswith("@FFF\nFHFH\nFFFH\nHFFG\n")
    assert lake.step("down")[0].startswith("SFFF\n@HFH")


@pytest.mark.slow
def test_trls_trainer_plays_a_text_env(tmp_path):
    """GRPOTrainer takes a step with the environment; its one tool plays the game."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from tests.chats import make_chat_tokenizer
    from tests.templates import real_template

    tokenizer = make_chat_tokenizer(eos="<|im_end|>", template=real_template("qwen2_5"))
    seen = []

    class Seen(as_trl_environment(LAKE)):
        def reset(self, **columns):
            seen.append(super().reset(**columns))
            return seen[-1]

    arguments = trl.GRPOConfig(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2, max_completion_length=8, report_to=[],
        use_cpu=True, bf16=False,
    )  # fmt: skip
    rows = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "Cross the lake."}], "seed": 0}] * 2)
    model = make_model("llama", len(tokenizer) + 8, max_position_embeddings=2048)
    trainer = trl.GRPOTrainer(model, None, arguments, rows, processing_class=tokenizer, environment_factory=Seen)
    trainer.train()
    assert seen and all("@FFF" in text for text in seen)


# --- the real packages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env_id", ["game:GuessTheNumber-v0-easy", "game:Mastermind-v0-easy", "game:FifteenPuzzle-v0-easy"])
def test_games_of_gem(env_id):
    pytest.importorskip("gem")
    green(partial(GEMEnv, env_id), [r"\boxed{3}", r"\boxed{1 2}", r"\boxed{up}", "no idea"])


@pytest.mark.parametrize("env_id", ["KuhnPoker-v0", "TicTacToe-v0", "ConnectFour-v0", "Nim-v0", "PigDice-v0"])
def test_games_of_textarena(env_id):
    pytest.importorskip("textarena")
    make = partial(TextArenaEnv, env_id, seat="parity", opponent="random")
    green(make, ["[check]", "[bet]", "[0]", "[4]", "[roll]", "[hold]", "[0 1]", "[col 2]"], n=6)


@pytest.mark.parametrize("env_id", ["FrozenLake-v0", "GuessTheNumber-v0", "TowerOfHanoi-v0"])
def test_games_of_textarena_for_one(env_id):
    pytest.importorskip("textarena")
    green(partial(TextArenaEnv, env_id), ["[up]", "[3]", "[A B]", "[right]"], n=4)


def test_an_environment_of_openenv():
    """A subclass of the real `Environment` with its pydantic actions; the field beside `metadata` is the turn."""
    types = pytest.importorskip("openenv.core.env_server.types")
    interfaces = pytest.importorskip("openenv.core.env_server.interfaces")

    class RealSay(types.Action):
        text: str

    class RealSaid(types.Observation):
        message: str

    class RealEcho(interfaces.Environment):
        def reset(self, seed=None, episode_id=None, **kwargs):
            self.word, self.turns = "ab"[(seed or 0) % 2], 0
            return RealSaid(message=f"say {self.word}")

        def step(self, action, timeout_s=None, **kwargs):
            self.turns += 1
            right = action.text == self.word
            return RealSaid(message=f"you said {action.text}", reward=float(right), done=self.turns == 2)

        @property
        def state(self):
            return types.State(episode_id=None, step_count=self.turns)

    env = OpenEnvEnv(RealEcho, action_cls=RealSay)
    assert env.reset(seed=1) == ("say b", {})
    assert env.step("b") == ("you said b", 1.0, False, False, {}) and env.step("a")[1:3] == (0.0, True)
    green(partial(OpenEnvEnv, RealEcho, action_cls=RealSay), ["a", "b"])


def test_an_environment_of_skyrl():
    """SkyRL's GSM8K in several turns: 1 for the right answer, 0.2 / max_turns for a wrong one in the right form."""
    kind = pytest.importorskip("skyrl_gym.envs.gsm8k.multi_turn_env").GSM8kMultiTurnEnv
    rows = [{"prompt": f"2*{n}=", "reward_spec": {"ground_truth": str(2 * n)}, "max_turns": 2} for n in range(2, 10)]
    env = SkyRLEnv(kind, rows)
    assert env.reset(seed=1)[0] == "2*3="
    text, reward, terminated, *_ = env.step("#### 7")
    assert "final numeric answer" in text and (reward, terminated) == (pytest.approx(0.1), False)
    assert env.step("#### 6")[1:3] == (1.0, True)
    green(partial(SkyRLEnv, kind, rows), ["#### 4", "#### 18", "no"])

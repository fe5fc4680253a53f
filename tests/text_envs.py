"""Small text environments for tests."""

import numpy as np


class Letters:
    """Pays 0.5 for every a and -0.25 for every b. h ends an episode, g truncates it. Observations differ in length."""

    def reset(self, *, seed=None):
        self.rng = np.random.default_rng(seed)
        self.turns = 0
        return "c" * int(self.rng.integers(1, 4)), {"start": int(self.rng.integers(5))}

    def step(self, action):
        self.turns += 1
        observation = "bc" * (len(action) % 3) + "d"
        info = {"length": len(action), "is_success": "h" in action, "note": "not a number"}
        return observation, worth(action), "h" in action, "g" in action, info


def worth(action):
    return 0.5 * action.count("a") - 0.25 * action.count("b")


class Scripted:
    """Replies at random, but as a function of the seed and of all actions so far: lengths, rewards and ends of every kind."""

    def reset(self, *, seed=None):
        self.history = [seed]
        rng = np.random.default_rng(seed)
        return "".join(rng.choice(list("abc"), rng.integers(1, 4))), {"level": int(rng.integers(3))}

    def step(self, action):
        self.history += [len(action), *map(ord, action)]
        rng = np.random.default_rng(self.history)
        observation = "".join(rng.choice(list("abc"), rng.integers(0, 5)))
        reward = float(rng.choice([0.0, 0.0, 0.5, -1.0]))
        ending = rng.random()
        return (
            observation,
            reward,
            bool(ending < 0.15),
            bool(0.1 < ending < 0.25),
            {"n": len(self.history), "is_success": ending < 0.1},
        )


class Closing(Scripted):
    """Pays a last reward, once, when a limit ends the episode."""

    def reset(self, *, seed=None):
        self.closed = self.ended = False
        return super().reset(seed=seed)

    def step(self, action):
        result = super().step(action)
        self.ended = result[2] or result[3]
        return result

    def final_reward(self):
        assert not self.closed and not self.ended
        self.closed = True
        return 0.25 * len(self.history)


class GuessNumber:
    """Guess a number from 1 to `largest`; the reply is "+" (higher) or "-" (lower). Ends after `turns` guesses, if not None."""

    prompt, largest, turns = "guess 1-7=", 7, None

    def reset(self, *, seed=None):
        self.number = int(np.random.default_rng(seed).integers(1, self.largest + 1))
        self.guesses = 0
        return self.prompt, {"number": self.number}

    def step(self, action):
        guess = int(action) if action.isdecimal() else 0
        self.guesses += 1
        right = guess == self.number
        if right:
            return "", 1.0, True, False, {"is_success": True}
        return "+" if guess < self.number else "-", 0.0, self.guesses == self.turns, False, {"is_success": False}


class ShortGame(GuessNumber):
    """Three numbers and two guesses: at random 5 of 9 games are won, and all with a first guess of 2."""

    prompt, largest, turns = "=", 3, 2

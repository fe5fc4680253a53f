"""Saving and loading an agent, on SB3's zip format, and the position between two rollouts from which it goes on."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.save_util import load_from_zip_file, open_path
from stable_baselines3.common.vec_env import VecEnv
from torch import nn

from agents.checks import check_optimizer
from agents.distributed import ALONE, World, placed, world
from agents.overlap import Ahead
from agents.policy import LanguagePolicy
from agents.rollout import clock_of
from agents.sharded import gathered, is_sharded, scattered, scattered_for
from agents.vec_env import rules_of_vec_env
from llm_env.prompts import PromptCursor
from llm_env.reference import KLController, coefficient
from llm_env.rules import Rules

SelfCheckpointed = TypeVar("SelfCheckpointed", bound="Checkpointed")
COUNTS = ("num_timesteps", "_tokens_left_over", "ep_info_buffer", "ep_success_buffer")  # that a rollout moves
MEMBERS = {"data", "policy.pth", "policy.optimizer.pth", "system_info.txt"}  # SB3 writes the last of them last


class Checkpointed(BaseAlgorithm):
    """What of an agent is written to a file, and how it comes back.

    All that a rollout moves besides the weights is the agent's *position*: counts, random states, the order of the prompts
    and an adaptive KL coefficient. Updates happen between rollouts only, so that a position and the weights are all that
    training goes on from. A rollout under way does not count: see `rollout_under_way`.
    """

    policy: LanguagePolicy
    _algorithm: str  # the class that wrote the file
    _algorithms: list[str]  # and those that it is made from
    world: World = ALONE
    _ahead: Ahead | None = None
    np_random: np.random.Generator
    _generator: torch.Generator
    _policy_data: dict[str, Any]
    _position: dict[str, Any]
    _began: dict[str, Any] | None
    _cursor: PromptCursor
    kl_coef: float | KLController = 0.0  # in the loss
    _reference_moved: bool
    _reference_weights: dict[str, Any] | None

    def _excluded_save_params(self) -> list[str]:
        live = ["_model", "_generator", "np_random", "_cursor", "_last_obs", "_last_episode_starts", "_tokenizer"]
        return [*super()._excluded_save_params(), *live, "_peft_config", "_began", "_reference_weights", "_ahead", "world"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer"], []

    @placed
    def save(self, path: Any, exclude: Any = None, include: Any = None) -> None:
        """Write the agent to one zip file: weights, optimizer, counts and random states, but not the env.

        Of a policy with an adapter, weights are the adapter's and the critic's; the base is known by its path and a hash. The
        file also says which parameters are trained, of which class the model is, and which algorithm wrote it. Of a model that
        transformers does not rebuild from its config (a class of your own, `trust_remote_code`, images and text, replaced
        modules) `save` warns that `load` will need `policy=<model>`.

        A file is first written beside its name and put in its place when it is whole and on the disk, so that a run that is
        cut off here, even killed, leaves the old one. A callback that saves in the middle of a rollout saves the agent as it
        stood at the rollout's beginning; whoever goes on from there collects it again, token for token.

        Of several processes, all of which call it, the main one writes the file; it is the same however many there are.
        """
        check_optimizer(self.policy)
        carried = self._position
        self._algorithm = type(self).__name__
        self._algorithms = [parent.__name__ for parent in type(self).__mro__]
        self._policy_data = self.policy._get_constructor_parameters()
        self._position = self._began or self._standing()
        try:
            if not isinstance(path, (str, Path)):
                return super().save(path, exclude, include)
            if not self.world.main:
                return gather_for_main(self)
            target = Path(path)
            if target.suffix == "":
                target = target.with_name(f"{target.name}.zip")
            with put_in_place(target) as file:
                super().save(file, exclude, include)
        finally:
            self._policy_data, self._position = {}, carried

    @property
    def rules(self) -> Rules:
        """The rules of the training env.

        Raises:
            ValueError: there is no env yet.
        """
        if self.env is None:
            raise ValueError(f"the agent has no env yet: give one to {type(self).__name__}(...), set_env(env) or learn(env)")
        return rules_of_vec_env(self.env)

    def set_logger(self, logger: Logger) -> None:
        """Log there; of several processes the main one."""
        super().set_logger(logger if self.world.main else Logger(None, []))

    # --- the position ------------------------------------------------------------------------------------------------

    def _fall_in_step(self) -> None:
        """Let all processes draw as the main one: one of them may have drawn something for itself."""
        if self.world.size == 1:
            return
        torch_state, numpy_state = self.world.from_main((self._generator.get_state(), self.np_random.bit_generator.state))
        self._generator.set_state(torch_state)
        self.np_random.bit_generator.state = numpy_state

    def _here(self) -> dict[str, Any]:
        position = {
            **self._position,  # of an agent that was loaded and has no env yet
            "counts": {name: copy.copy(getattr(self, name)) for name in COUNTS},
            "torch": (self.device.type, self._generator.get_state()),
            "numpy": self.np_random.bit_generator.state,
            "kl_in_loss": coefficient(self.kl_coef),
        }
        if self.env is not None:
            venv, kl = clock_of(self.env), self.rules.kl
            position["env"] = None if venv is None else venv.state_dict()
            position["seeds"] = list(self.env._seeds)  # that wait for the first reset
            position["cursor"] = self._cursor.state_dict()
            position["kl_coef"] = None if kl is None else kl.value
        return position

    def _standing(self) -> dict[str, Any]:
        """The position; where the next rollout is being drawn already, before that, for it does not count yet."""
        return self._here() | ({} if self._ahead is None else self._ahead.began)

    def call_off(self) -> None:
        """Give up the rollout that is being drawn ahead; its prompts and random numbers are drawn again."""
        if self._ahead is None:
            return
        assert self.env is not None
        position = self._standing()
        self._ahead.wait()
        self._ahead = None
        self._restore_generators(position)
        self._restore_prompts(self.env, self.rules, position)

    @contextmanager
    def rollout_under_way(self) -> Iterator[None]:
        """Until its end a rollout has not happened: a file saved meanwhile, and an agent stopped, stand where it began.

        `stop_rollout`, an error or Ctrl-C end it early; what was drawn is drawn again when training goes on.
        """
        self._began = self._standing()
        try:
            yield
        except BaseException:
            self.stop_rollout()
            raise
        finally:
            self._began = None

    def stop_rollout(self) -> None:
        """Go back to where the rollout under way began."""
        assert self._began is not None and self.env is not None
        self._restore_generators(self._began)
        self._restore_prompts(self.env, self.rules, self._began)

    def _restore_generators(self, position: dict[str, Any]) -> None:
        """Go on with the counts and random numbers of a position; on another kind of device, with other random numbers."""
        if not position:
            return
        vars(self).update({name: copy.copy(value) for name, value in position["counts"].items()})
        kind, state = position["torch"]
        if kind == self.device.type:
            self._generator.set_state(state)
        self.np_random.bit_generator.state = position["numpy"]
        if isinstance(self.kl_coef, KLController):
            self.kl_coef.value = position["kl_in_loss"]

    def _restore_prompts(self, env: VecEnv, rules: Rules, position: dict[str, Any]) -> None:
        """Go on with the order of the prompts and the KL coefficient of a position, where they fit the env."""
        venv = clock_of(env)
        if venv is not None and position.get("env") is not None and venv.fits(position["env"]):
            env._seeds = list(position.get("seeds", [None] * env.num_envs))
            venv.load_state_dict(position["env"])
        if position.get("cursor") is not None and position["cursor"]["size"] == len(rules.prompts):
            self._cursor.load_state_dict(position["cursor"])
        if position.get("kl_coef") is not None and rules.kl is not None and type(rules.kl) is not KLController:
            rules.kl.value = position["kl_coef"]  # a fixed coefficient is the env's to say

    # --- the reference -----------------------------------------------------------------------------------------------

    def get_parameters(self) -> dict[str, dict[str, Any]]:
        """The weights as SB3 saves them, and those of a reference that is no longer the one the env was made with."""
        if self.world.sharded:
            self.world.gather(None, "weights")
        weights = self._reference_weights  # of an agent that was loaded and has no env yet
        if self._reference_moved and self.env is not None:
            reference = self.rules.reference
            weights = None if reference is None else gathered(reference.model.state_dict())
        return gathered(super().get_parameters()) | ({} if weights is None else {"reference": weights})

    def set_parameters(self, load_path_or_dict: Any, exact_match: bool = True, device: torch.device | str = "auto") -> None:
        """Take over weights: those of `get_parameters`, or a saved agent's."""
        params = load_path_or_dict
        if not isinstance(params, dict):
            check_whole(params)
            _, params, _ = load_from_zip_file(params, device=device, load_data=False)
        self._reference_weights = params.get("reference")
        own = {key: params[key] for key in params if key != "reference"}
        if is_sharded(self.policy):
            own["policy"] = scattered(own["policy"], self.policy.state_dict())
            if "policy.optimizer" in own:
                own["policy.optimizer"] = scattered_for(self.policy.optimizer, own["policy.optimizer"])
        super().set_parameters(own, exact_match, device)
        if self.env is not None:
            self._restore_reference(self.rules)

    def _restore_reference(self, rules: Rules) -> None:
        """Give the env's reference the weights that were saved with the agent, if any were."""
        weights, self._reference_weights = self._reference_weights, None
        if weights is None:
            return
        if rules.reference is None:
            raise ValueError(
                "the saved agent's reference had moved and its weights are in the file, but the env has no reference; make it "
                "with reference=<the model that training began with>"
            )
        try:
            rules.reference.model.load_state_dict(scattered(weights, rules.reference.model.state_dict()))
        except RuntimeError as error:
            raise ValueError(
                f"the saved reference's weights do not fit the env's {type(rules.reference.model).__name__} "
                f"({str(error).splitlines()[-1].strip()}); make the env with the reference that training began with"
            ) from error

    # --- loading -----------------------------------------------------------------------------------------------------

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfCheckpointed],
        path: Any,
        env: Any = None,
        device: torch.device | str = "auto",
        *,
        policy: Any = None,
        **kwargs: Any,
    ) -> SelfCheckpointed:
        """Read an agent that `save` wrote, to use it or to go on training.

        Training goes on bit for bit (on CPU, with the same libraries and threads) as if it had never stopped, with the same
        env and `learn(..., reset_num_timesteps=False)`. What is not the agent's is not in the file: the state of wrappers,
        of reward functions and of callbacks.

        Args:
            path: the zip file.
            env: the env to go on with; its order of prompts goes on where it was if it has as many prompts and rows.
            device: where to put it.
            policy: the model whose place the weights take, a path, a hub id or a `PreTrainedModel`: one of the saved class and
                config, where these do not come back from the file (see `save`), or the base of a saved adapter, where it was a
                model object or is not where it was. The weights of a whole model come from the file; those of an adapter's base
                are checked to be the right ones.
            kwargs: SB3's `custom_objects`, `print_system_info`, and attributes to replace.

        Raises:
            FileNotFoundError: If there is no such file.
            TypeError: If `policy` is no causal language model.
            ValueError: If the file was cut off or damaged, another algorithm wrote it, its model cannot be rebuilt, `policy` is
                another one, or an adapter's base is not there or has other weights.
        """
        with world().at("load"):
            world().gather(None)  # whoever wrote the file has done so
        if isinstance(path, (str, Path)) and Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder, as save_pretrained writes it; make an agent of it: {cls.__name__}({str(path)!r}, env)"
            )
        check_whole(path)
        check_algorithm(path, cls)
        if isinstance(policy, LanguagePolicy):
            raise TypeError("policy is a LanguagePolicy; give the model, such as LanguagePolicy.lm, or its path")
        if policy is not None and not isinstance(policy, (str, Path, nn.Module)):
            raise TypeError(f"the model given to load is a {type(policy).__name__}; give a model, its path or its hub id")
        given: dict[str, Any] = {} if policy is None else {"_model": policy}
        agent = super().load(path, None, device, **kwargs, **given)
        agent.policy.check_fingerprint(agent._policy_data)
        agent._policy_data = {}
        if env is not None:
            agent.set_env(env)
        return agent


def gather_for_main(agent: Checkpointed) -> None:
    """Hand over what the main process needs to write the whole agent."""
    if agent.world.sharded:
        agent.get_parameters()


@contextmanager
def put_in_place(target: Path) -> Iterator[io.BufferedWriter]:
    """A file to write that takes the name `target` once all of it is on the disk; until then the old one keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    with suppress(OSError):  # not every system can write out a folder; the file is in its place all the same
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_algorithm(path: Any, kind: type[Checkpointed]) -> None:
    """Raise if an agent's file was written by another algorithm; those of version 0.1 do not say by which.

    Raises:
        ValueError: If it was written by neither `kind` nor a class that it is made from, nor one that is made from it; or by an
            agent of Stable-Baselines3.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            data = json.loads(archive.read("data"))
    finally:
        file.seek(0) if file is path else file.close()
    if "_policy_data" not in data:
        raise ValueError(
            f"{path} was not saved by an agent of this package, but by Stable-Baselines3; load it with its own class"
        )
    wrote, parents = data.get("_algorithm"), data.get("_algorithms", [data.get("_algorithm")])
    if wrote is not None and kind.__name__ not in parents and wrote not in [parent.__name__ for parent in kind.__mro__]:
        raise ValueError(f"{path} was saved by {wrote}, not by {kind.__name__}; load it with {wrote}.load(...)")


def check_whole(path: Any) -> None:
    """Refuse a file that is not all that `save` wrote.

    The sums of all parts are checked, for torch reads weights without looking at them; and that all of SB3's parts are there,
    for a zip whose writing was ended by an error is closed as if it were whole, and what is left of one that was cut off may
    end with a part that is a zip itself.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it was cut off or damaged.
    """
    file = open_path(path, "r", suffix="zip")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged, missing = archive.testzip(), sorted(MEMBERS - set(archive.namelist()))
        fault = f"{damaged} is damaged" if damaged else f"{', '.join(missing)} is missing" if missing else ""
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
        fault = str(error) or type(error).__name__
    finally:
        file.seek(0) if file is path else file.close()
    if fault:
        raise ValueError(
            f"{path} is no whole agent ({fault}): it was cut off or damaged while it was written or copied, or save did not "
            "write it; load an earlier file, for instance one of CheckpointCallback's"
        )

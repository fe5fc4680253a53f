"""`compile=True`: the same training, by layers that are compiled once for all lengths."""

import shutil

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import llm_env
from agents import GRPO, PPO
from llm_env.lm.compiling import compiled_layers, num_compiled_graphs
from tests.decoders import build as make_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (torch.cuda.is_available() or shutil.which("g++")), reason="needs a compiler"),
]


def learned(algorithm, **settings):
    agent = algorithm(llm_env.PUPIL, "llm_env/Addition-v0", 1e-4, n_envs=32, seed=0, device="cpu", **settings)
    return agent.learn(400)


@pytest.mark.parametrize("algorithm, settings", [(GRPO, {"group_size": 4}), (PPO, {"batch_size": 16})])
def test_it_learns_the_same(algorithm, settings):
    plain, compiled = learned(algorithm, **settings), learned(algorithm, compile=True, **settings)
    assert compiled.num_timesteps == plain.num_timesteps
    for a, b in zip(plain.policy.parameters(), compiled.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    compiled.learn(1000, reset_num_timesteps=False)
    graphs = num_compiled_graphs()
    compiled.learn(2000, reset_num_timesteps=False)  # rollouts of other lengths
    assert num_compiled_graphs() == graphs > 0


def test_the_number_of_graphs_is_logged(tmp_path):
    agent = learned(GRPO, group_size=4, compile=True, tensorboard_log=str(tmp_path))
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert [event.value for event in events.Scalars("time/compiled_graphs")][-1] == num_compiled_graphs() > 0
    assert agent.compile and "compile=True" in repr(agent)


def test_layers_are_compiled_within_the_block_only():
    model = make_model("llama")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with compiled_layers([model]):
            assert "forward" in vars(model.model.layers[0])
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert "forward" not in vars(model.model.layers[0])

"""The toy worlds are what they claim: taught, graded by a script, the same from the same seed."""

import json

import pytest
import torch

import toy_world


@pytest.fixture(scope="session")
def addition(tmp_path_factory):
    torch.set_num_threads(2)
    folder = toy_world.build(tmp_path_factory.mktemp("worlds") / "addition", "addition", train=256, test=64)
    torch.set_num_threads(1)
    return folder


def read(path):
    return [json.loads(line) for line in open(path)]


def test_addition_can_be_built_taught_and_graded(addition):
    """Some sums are right, most are not; each form of the data says the same."""
    rewards = toy_world.grade(addition / "policy", addition, "addition")
    assert 0.03 < sum(rewards) / len(rewards) < 0.4
    train, test = (read(addition / f"prompts_{split}.jsonl") for split in ("train", "test"))
    assert len(train) == 256 and len(test) == 64
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    answers = {row["prompt"]: row["answer"] for row in train}
    assert all(str(eval(prompt)) == answer for prompt, answer in answers.items())
    for group in read(addition / "groups_train.jsonl"):
        right = [float(text == answers[group["prompt"]]) for text in group["completions"]]
        assert group["rewards"] == right
    for pair in read(addition / "pairs_train.jsonl"):
        assert pair["chosen"] == answers[pair["prompt"]] != pair["rejected"]
    for row in read(addition / "labels_train.jsonl"):
        assert row["label"] == (row["completion"] == answers[row["prompt"]])


def test_letters_reward_is_graded():
    """Different strings, different utilities; too short, too long and strange ones are worst."""
    prompts = ["abcd"] * 5
    texts = ["abcdefghijkl", "l" * 12, "a" * 7, "a" * 17, "abcdefghij1l"]
    rewards = toy_world.letters_reward(prompts, texts)
    assert rewards[0] != rewards[1] and rewards[2:] == [-2.0] * 3
    assert rewards == toy_world.letters_reward(prompts, texts)


def test_prompts_do_not_repeat_and_depend_on_the_seed():
    for world in toy_world.WORLDS:
        train, test = toy_world.make_prompts(world, 300, 60, seed=1)
        prompts = [row["prompt"] for row in train + test]
        assert len(set(prompts)) == 360
        assert toy_world.make_prompts(world, 300, 60, seed=1) == (train, test)
        assert toy_world.make_prompts(world, 300, 60, seed=2)[0] != train

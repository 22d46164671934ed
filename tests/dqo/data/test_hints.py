"""Columns of public data sets, and what a user is told who gives them to `dqo check` as they are."""

import pytest

from dqo.data.rows import read_rows
from dqo.errors import UserError

CHOICE = "write prompt, chosen and rejected"
GROUPED = "one row a prompt, with the lists completions (strings) and rewards (numbers)"
UNSAMPLED = "problems without responses: sample responses and grade them first"
GRADE = "add a reward: grade the responses, or give every row the reward 1.0 to imitate all of them (supervised fine-tuning)"
PREFERENCE = "run `dqo convert trl-preference`"
PUBLISHED = {  # data set: (columns, what its hint says)
    "tatsu-lab/alpaca": (
        "instruction input output text",
        f"rename instruction to prompt, put input below it, rename output to completion, {GRADE}",
    ),
    "garage-bAInd/Open-Platypus": ("input output instruction data_source", "rename instruction to prompt"),
    "databricks-dolly-15k": (
        "instruction context response category",
        "rename instruction to prompt, put context below it, rename response",
    ),
    "RyokoAI/ShareGPT52K": ("id conversations", "last turn of gpt to completion"),
    "open-thoughts/OpenThoughts-114k": ("system conversations", "roles system, user (human) and assistant (gpt)"),
    "HuggingFaceH4/ultrachat_200k": ("prompt prompt_id messages", "move the last assistant message to completion"),
    "allenai/tulu-3-sft-mixture": ("id messages source", "move the last assistant message to completion"),
    "OpenAssistant/oasst1": ("message_id parent_id user_id text role lang rank", "tree of messages"),
    "camel-ai/math": (
        "role_1 topic sub_topic message_1 message_2",
        "rename message_1 to prompt and message_2 to completion",
    ),
    "Anthropic/hh-rlhf": ("chosen rejected", PREFERENCE),
    "Skywork-Reward-Preference": ("chosen rejected source", PREFERENCE),
    "Intel/orca_dpo_pairs": ("system question chosen rejected", "preference data: rename question to prompt"),
    "argilla/distilabel-intel-orca-dpo-pairs": ("system input chosen rejected generations", "rename input to prompt"),
    "openbmb/UltraFeedback": (
        "source instruction models completions correct_answers",
        f"UltraFeedback: write {GROUPED}: instruction is the prompt",
    ),
    "berkeley-nest/Nectar": (
        "prompt answers turns num_responses source good_natured",
        f"ranked answers: write {GROUPED}",
    ),
    "HuggingFaceH4/stack-exchange-preferences": ("qid question answers date metadata", GROUPED),
    "PKU-SafeRLHF": ("prompt response_0 response_1 better_response_id safer_response_id", CHOICE),
    "nvidia/HelpSteer3": ("domain language context response1 response2 overall_preference", CHOICE),
    "lmsys/arena": ("prompt response_a response_b winner_model_a winner_model_b", CHOICE),
    "lmsys/chatbot_arena_conversations": ("question_id model_a model_b winner conversation_a conversation_b", CHOICE),
    "stanfordnlp/SHP": ("post_id history human_ref_A human_ref_B labels score_A score_B", CHOICE),
    "openai/webgpt_comparisons": ("question answer_0 answer_1 score_0 score_1", CHOICE),
    "openai/summarize_from_feedback": ("info summaries choice worker batch", CHOICE),
    "tatsu-lab/alpaca_farm": ("instruction input output_1 output_2 preference", CHOICE),
    "nvidia/HelpSteer2": (
        "prompt response helpfulness correctness coherence",
        "graded responses: rename response to completion, rename helpfulness to reward",
    ),
    "meta-math/MetaMathQA": (
        "type query original_question response",
        f"rename query to prompt, rename response to completion, {GRADE}",
    ),
    "Magpie": (
        "uuid instruction response model",
        f"rename instruction to prompt, rename response to completion, {GRADE}",
    ),
    "openai/gsm8k": ("question answer", UNSAMPLED),
    "hendrycks/MATH": ("problem level type solution", UNSAMPLED),
    "HuggingFaceH4/MATH-500": ("problem solution answer subject level unique_id", UNSAMPLED),
    "openai/openai_humaneval": ("task_id prompt canonical_solution test entry_point", UNSAMPLED),
    "codeparrot/apps": ("problem_id question solutions input_output difficulty", UNSAMPLED),
    "nvidia/OpenMathInstruct-1": (
        "question expected_answer generated_solution is_correct",
        "rename question to prompt, rename generated_solution to completion, rename is_correct to label",
    ),
    "nvidia/OpenMathInstruct-2": (
        "problem generated_solution expected_answer problem_source",
        f"rename generated_solution to completion, {GRADE}",
    ),
    "Qwen/ProcessBench": (
        "id generator problem steps final_answer_correct label",
        "rename final_answer_correct to label",
    ),
    "open-r1/OpenR1-Math-220k": ("problem solution answer generations correctness_math_verify", "dqo convert open-r1"),
    "BytedTsinghua-SIA/DAPO-Math-17k": ("data_source prompt ability reward_model extra_info", "dqo convert verl"),
    "peiyi9979/Math-Shepherd": ("input label task", "dqo convert math-shepherd"),
    "openai/prm800k": ("labeler timestamp question label", "dqo convert prm800k"),
    "wikitext": ("text", "cut each into prompt and completion"),
    "responses and rewards": (
        "prompt responses rewards",
        f"rename responses to completions; grouped rows are {GROUPED}",
    ),
    "responses and scores": ("question responses scores", "rename responses to completions"),
    "outputs of a sampler": ("prompt outputs", "rename outputs to completions"),
    "vLLM": (
        "prompt prompt_token_ids text token_ids cumulative_logprob finish_reason",
        f"rename text to completion, rename prompt_token_ids to prompt_ids, rename token_ids to completion_ids, {GRADE}",
    ),
    "vLLM, graded": ("prompt text token_ids reward", "rename text to completion, rename token_ids to completion_ids"),
    "question, answer, score": (
        "question answer score",
        "graded responses: rename question to prompt, rename answer to completion, rename score to reward",
    ),
    "prompt, text": ("prompt text", f"rename text to completion, {GRADE}"),
    "demonstrations": ("prompt completion", f"demonstrations: {GRADE}"),
    "no prompt": ("completion reward", "graded responses: add a prompt"),
}


def told(columns):
    with pytest.raises(UserError) as caught:
        read_rows([dict.fromkeys(columns, "x")])
    return str(caught.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_public_data_set_is_told_what_to_do_with_its_columns(name):
    columns, hint = PUBLISHED[name]
    message = told(columns.split())
    assert hint in message and f"found {columns.replace(' ', ', ')}" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    "columns, meant",
    [
        ("prompt completion rewards", "reward"),
        ("prompt completon score", "completion"),
        ("promt completion reward", "prompt"),
        ("prompt completions reward", "rewards"),
        ("prompt completion reward step_reward", "step_rewards"),
    ],
)
def test_a_misspelling_is_still_named(columns, meant):
    assert f"Did you mean '{meant}'?" in told(columns.split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_columns_that_a_hint_renames_are_there_and_make_needed_ones(name):
    message = told(PUBLISHED[name][0].split())
    words = message.replace(",", "").replace(";", "").split()
    for i, word in enumerate(words):
        if word == "rename":
            assert words[i + 1] in PUBLISHED[name][0].split() and words[i + 2] == "to"
            assert words[i + 3] in {
                "prompt",
                "completion",
                "completions",
                "reward",
                "label",
                "prompt_ids",
                "completion_ids",
            }

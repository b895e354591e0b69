"""The bug zoo: bugs that others published, put back into this project one at a time; the tests must see every one of them.

A mutant is one change: the text `old`, which stands exactly once in a file, becomes `new`. It runs in a copy of the tree, and is
killed when a test fails there. It is no kill when a module cannot even be imported or collected: the tests must judge what the
code does, not that it is broken.

    python tests/mutants.py                        all, a few minutes on one core; exit code 1 if one survives
    python tests/mutants.py kl-sign whiten-per-row these
    python tests/mutants.py --sample 5 --seed 3    five by lot
    python tests/mutants.py --list                 names, files and bugs; nothing is run
    python tests/mutants.py --write                all, and the table goes into tests/README.md

How to use it for learning: `--show NAME` prints the change. Apply it, train, and look which number tells first.
"""
import argparse, multiprocessing, os, random, re, shutil, sys, tempfile, time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README, BEGIN, END = ROOT / "tests" / "README.md", "<!-- mutants -->", "<!-- /mutants -->"
LIMIT = 120   # seconds for the tests of one mutant; what makes them hang is seen, too


@dataclass
class Mutant:
    name: str
    file: str
    old: str
    new: str
    bug: str
    published: str   # who had it; the number is that of an issue or a pull request
    tests: str       # the test modules that should see it, in the order to try them


M = Mutant
MUTANTS = [
    # Shifts: logits, log-probs, values and masks are of different frames.
    M("logprobs-late", "gpt.py", "F.log_softmax(logits[:, :-1].float()", "F.log_softmax(logits[:, 1:].float()",
      "a token's log-prob is read after the model has seen it", "prime-rl PR #1525 (seen in review)", "gpt"),
    M("mask-early", "ppo.py", "(target >= prompt_lengths[:, None])", "(target >= prompt_lengths[:, None] - 1)",
      "the mask starts one action early: the last token of the prompt is trained", "OpenRLHF #973", "ppo"),
    M("mask-late", "ppo.py", "target = torch.arange(1, T, device", "target = torch.arange(0, T - 1, device",
      "the mask starts one action late and ends on padding", "ttumiel/minRLHF summarize_gpt.py", "ppo"),
    M("values-late", "ppo.py", "values=value_model(ids)[:, :-1],", "values=value_model(ids)[:, 1:],",
      "the critic has seen the action that it is to foresee", "lucidrains/PaLM-rlhf-pytorch #57", "ppo"),
    M("reward-before-the-end", "ppo.py", "reward_model.score(ids, lengths)", "reward_model.score(ids, lengths - 1)",
      "the last token is invisible to the reward", "ttumiel/minRLHF happy_tweet_gpt_ppo.py", "ppo"),

    # The end token.
    M("end-masked", "ppo.py", "(target < lengths[:, None])).float()", "(target < lengths[:, None] - 1)).float()",
      "the end token is outside the mask, so nobody learns to stop", "rlhf-book policy_gradients; nanochat chat_rl.py", "ppo"),
    M("pad-as-end", "gpt.py", 'return enc._special_tokens["<|end|>"]', 'return enc._special_tokens["<|pad|>"]',
      "padding is the end token", "trl #1623, #3091; minChatGPT", "sft"),
    M("missing-end-free", "ppo.py", "scores=torch.where(ended, reward_model.score(ids, lengths), cfg.missing_end)",
      "scores=reward_model.score(ids, lengths)",
      "an answer cut for length counts as finished", "InstructLLaMA rl_ppo.py; train-llm-from-scratch rollout.py", "ppo"),
    M("no-stop", "ppo.py", "cfg.max_new_tokens, stop=end, seed", "cfg.max_new_tokens, seed",
      "rollouts run on after the end token", "minChatGPT trainers.py", "ppo"),

    # What is sampled is not what is scored.
    M("top-k-rollout", "ppo.py", "cfg.max_new_tokens, stop=end, seed", "cfg.max_new_tokens, stop=end, top_k=30, seed",
      "rollouts are sampled with top-k, log-probs are of the full softmax: the KL turns negative",
      "ttumiel/minRLHF; minimind train_ppo.py; trl #1002", "ppo"),
    M("cool-rollout", "ppo.py", "cfg.max_new_tokens, stop=end, seed", "cfg.max_new_tokens, stop=end, temperature=0.6, seed",
      "rollouts at temperature 0.6, log-probs at 1", "rlhf-book; minimind train_ppo.py", "ppo"),
    M("temperature-forgotten", "gpt.py", "logits[:, :-1].float() / temperature, dim=-1)", "logits[:, :-1].float(), dim=-1)",
      "log-probs are not divided by the sampling temperature", "OpenRLHF PR #853", "gpt"),
    M("temperature-twice", "gpt.py", "logits[:, :-1].float() / temperature, dim=-1)",
      "logits[:, :-1].float() / temperature / temperature, dim=-1)",
      "log-probs are divided by the temperature twice", "RL-Kernel PR #423", "gpt"),
    M("half-logprobs", "gpt.py", "F.log_softmax(logits[:, :-1].float() / temperature",
      "F.log_softmax(logits[:, :-1] / temperature",
      "log-probs in bf16: ratios of nearly equal policies are noise", "rlhf-book policy_gradients (all in bf16)", "gpt"),
    M("old-is-not-the-sampler", "ppo.py", "old_logprobs=ref_logprobs if sampler is reference else logprobs",
      "old_logprobs=logprobs",
      "the ratio is not to the policy that sampled", "minimind #638", "ppo"),
    M("top-p-short", "gpt.py", "(ordered.cumsum(-1) - ordered)[:, 1:] >= top_p", "ordered.cumsum(-1)[:, 1:] >= top_p",
      "the token that crosses top_p is dropped", "rasbt/reasoning-from-scratch #164", "gpt"),

    # The KL penalty and the score.
    M("kl-sign", "ppo.py", "-beta * (logprobs - ref_logprobs)", "beta * (logprobs - ref_logprobs)",
      "the KL is maximised", "Logic-RL #58; rlhf-book loss.py (kl1)", "ppo"),
    M("k3-in-the-reward", "ppo.py", "-beta * (logprobs - ref_logprobs)",
      "-beta * ((ref_logprobs - logprobs).exp() - 1 + logprobs - ref_logprobs)",
      "k3 as the reward: right mean, wrong gradient", "rlhf-book loss.py; trl kl_estimator=k3", "ppo"),
    M("kl-clipped", "ppo.py", "-beta * (logprobs - ref_logprobs)", "-beta * (logprobs - ref_logprobs).clamp(min=0)",
      "the log-ratio is clipped at 0: tokens never pay back", "InstructLLaMA rl_ppo.py", "ppo"),
    M("kl-of-padding", "ppo.py", "rewards = torch.where(mask, -beta * (logprobs - ref_logprobs), 0.0)",
      "rewards = -beta * (logprobs - ref_logprobs)",
      "KL of prompt and padding", "rlhf-book PR #216", "ppo"),
    M("score-after-the-end", "ppo.py", "last = mask & (steps == torch.where(mask, steps, -1).amax(1, keepdim=True))",
      "last = steps == torch.where(mask, steps, -1).amax(1, keepdim=True) + 1",
      "the score is paid one slot after the end token", "trl #3750; DeepSpeedExamples PR #672", "ppo"),
    M("score-everywhere", "ppo.py", "torch.where(last, scores[:, None], 0.0)", "torch.where(mask, scores[:, None], 0.0)",
      "every token is paid the whole score", "DeepSpeedExamples #751 (asked)", "ppo"),
    M("entropy-of-padding", "ppo.py", '"objective/entropy": -(b["logprobs"] * mask).sum(1)',
      '"objective/entropy": -b["logprobs"].sum(1)',
      "the logged entropy counts padding", "trl before 1.12", "ppo"),

    # PPO's losses.
    M("ratio-inverse", "ppo.py", "logprobs - old_logprobs, 0.0", "old_logprobs - logprobs, 0.0",
      "old over new", "rlhf-book loss.py (kl3)", "ppo"),
    M("clip-inert", "ppo.py", "masked_mean(torch.maximum(unclipped, clipped), mask)",
      "masked_mean(torch.minimum(unclipped, clipped), mask)",
      "min and max swapped: the clip never holds where it should", "yandexdataschool/Practical_RL #248", "ppo"),
    M("policy-sign", "ppo.py", "unclipped, clipped = -advantages * ratio, -advantages *",
      "unclipped, clipped = advantages * ratio, advantages *",
      "the loss is the gain: its minus is missing", "rlhf-book #125", "ppo"),
    M("policy-over-padding", "ppo.py", "return masked_mean(torch.maximum(unclipped, clipped), mask)",
      "return torch.maximum(unclipped, clipped).mean()",
      "policy loss is a mean over padding", "PaLM-rlhf-pytorch ppo.py; minChatGPT loss.py; trl #7024", "ppo"),
    M("value-over-padding", "ppo.py",
      "0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask.float())",
      "0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2).mean()",
      "value loss is a mean over padding", "minChatGPT loss.py", "ppo"),
    M("masked-but-divided-by-all", "ppo.py", "return (x * mask).sum() / mask.sum().clamp(min=1)", "return (x * mask).mean()",
      "masked, but divided by padding too: longer batches learn less", "trl #7024", "ppo"),
    M("value-clip-min", "ppo.py", "torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)",
      "torch.minimum((values - returns) ** 2, (clipped - returns) ** 2)",
      "the smaller of the two value errors", "ray-project/ray #2233", "ppo"),
    M("critic-dead", "ppo.py", "vf_loss = value_loss(values, old_values",
      "vf_loss = value_loss(old_values + 0 * values, old_values",
      "the critic gets no gradient", "CoursIA PR #15256", "ppo"),
    M("early-stop-sign", "ppo.py", "approxkl=0.5 * masked_mean(log_ratio ** 2, mask).item()",
      "approxkl=masked_mean(log_ratio, mask).item()",
      "early stop looks at new - old, whose mean is negative", "thomfoster/minRLHF ppo_trainer.py", "ppo"),
    M("ptx-same-batch", "ppo.py", "cfg.ptx_tokens, block, rng)", "cfg.ptx_tokens, block, random.Random(cfg.seed))",
      "the text of the ptx term starts again in each update", "InstructLLaMA rl_ppo.py", "ppo"),

    # GAE and whitening.
    M("values-after-the-end", "gae.py", "values = torch.where(mask, values, 0).to(dtype)", "values = values.to(dtype)",
      "values after the end are not 0", "thomfoster/minRLHF buffer.py; DeepSpeedExamples PR #672", "gae"),
    M("bootstrap", "gae.py", "next_value = next_advantage = values.new_zeros(len(values))",
      "next_value, next_advantage = values[:, -1], values.new_zeros(len(values))",
      "the last value of the row stands in for the end", "rlhf-book PR #216 (padding in the returns)", "gae"),
    M("gae-unmasked", "gae.py", "torch.where(mask[:, t], delta + gamma * lam * next_advantage, 0)",
      "delta + gamma * lam * next_advantage",
      "advantages of padding flow into the answer", "miles PR #1827", "gae"),
    M("lambda-gamma", "gae.py", "def gae(rewards, values, mask, gamma=1.0, lam=0.95):",
      "def gae(rewards, values, mask, lam=1.0, gamma=0.95):",
      "arguments of the call in each other's place", "ttumiel/minRLHF happy_tweet_gpt_ppo.py", "gae"),
    M("rewards-shifted", "gae.py", "delta = rewards[:, t] + gamma", "delta = rewards[:, t - 1] + gamma",
      "an action is paid the reward of the one before", "openai/spinningup #50", "gae"),
    M("returns-are-rewards", "gae.py", "return advantages, advantages + values",
      "return advantages, torch.where(mask, rewards, 0).to(dtype)",
      "the critic's target is the reward of the token", "rlhf-book PR #216", "gae"),
    M("whiten-before-returns", "gae.py", "return advantages, advantages + values",
      "return advantages, whiten(advantages, mask) + values",
      "returns are made of whitened advantages", "ash80/RLHF_in_notebooks", "gae"),
    M("whiten-mean-kept", "gae.py", "x = torch.where(mask, x - x.sum() / n, 0)", "x = torch.where(mask, x, 0)",
      "whitening keeps the mean", "ash80/RLHF_in_notebooks; torchtune whiten", "gae"),
    M("whiten-per-row", "gae.py", "x = torch.where(mask, x - x.sum() / n, 0)",
      "x = torch.where(mask, x - x.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1), 0)",
      "whitening per row: which answer was better is lost", "thomfoster/minRLHF buffer.py", "gae"),
    M("whiten-over-padding", "gae.py", "n = mask.sum().clamp(min=1)", "n = mask.numel()",
      "whitening counts padding", "trlx; thomfoster/minRLHF buffer.py", "gae"),
    M("not-whitened", "ppo.py", 'advantages = gae.whiten(advantages, b["mask"])', "advantages = 1 * advantages",
      "advantages are not whitened", "rlhf-book utils.py", "ppo"),

    # Four models in their modes.
    M("dropout-kept", "gpt.py", '"dropout": dropout})', '"dropout": state["gpt"]["dropout"] or dropout})',
      "pretraining's dropout is on while the ratio is taken", "trl PR #1540; ttumiel/minRLHF", "gpt"),
    M("train-mode", "gpt.py", "return model.to(device).eval(), enc, state", "return model.to(device).train(), enc, state",
      "policy and reference in train mode", "ttumiel/minRLHF; trl PR #1540", "gpt"),
    M("reference-in-train-mode", "ppo.py", 'reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)',
      'reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False).train()',
      "the reference alone in train mode: KL is noise", "trl PR #1540", "ppo"),
    M("reference-is-the-policy", "ppo.py", 'reference = gpt.load_model(out / "sft.pt", device)[0].requires_grad_(False)',
      "reference = policy",
      "no frozen reference: the KL is always 0", "PaLM-rlhf-pytorch ppo.py; POVID #11", "ppo"),
    M("sampling-with-dropout", "gpt.py", "    was_training = model.training\n    model.eval()",
      "    was_training = model.training\n    model.train()",
      "answers are sampled with dropout", "ttumiel/minRLHF", "gpt"),

    # The reward model.
    M("ranking-sign", "reward.py", "losses = -F.logsigmoid(", "losses = F.logsigmoid(",
      "the minus of the loss is missing", "rlhf-book #125 (of the policy loss)", "reward"),
    M("log-of-sigmoid", "reward.py", "-F.logsigmoid(scores[:, :, None] - scores[:, None, :])",
      "-torch.log(torch.sigmoid(scores[:, :, None] - scores[:, None, :]))",
      "log(sigmoid(x)): infinite for a pair that is very wrong", "minChatGPT loss.py", "reward"),
    M("kwise-twice", "reward.py", "(losses.sum((1, 2)) / n.clamp(min=1))", "(losses.sum((1, 2)) / n.clamp(min=1) ** 2)",
      "divided by the number of pairs twice", "minChatGPT KPairwiseLoss; trlx #220", "reward"),
    M("ties-as-pairs", "reward.py", "(ranks[:, :, None] < ranks[:, None, :])", "(ranks[:, :, None] <= ranks[:, None, :])",
      "answers of equal rank are pushed apart", "InstructGPT C.2 warns; ImageReward #2 (rankings full of ties)", "reward"),
    M("score-at-the-last-column", "reward.py", "[torch.arange(len(ids), device=ids.device), lengths - 1]", "[:, -1]",
      "the score is read on padding", "trlx examples/summarize_rlhf; ColossalAI #4475", "reward"),
    M("score-one-early", "reward.py", "device=ids.device), lengths - 1]", "device=ids.device), lengths - 2]",
      "the score is read one token before the end", "gpt-neox PR #1285", "reward"),
    M("score-mean-over-time", "reward.py", "return self(ids)[torch.arange(len(ids), device=ids.device), lengths - 1]",
      "return self(ids).mean(1)",
      "the score is the mean over time, padding included", "minChatGPT gpt.py; ColossalAI #4475", "reward"),
    M("margin-on-padding", "reward.py", "(torch.arange(T) < min(len(answers[i]), len(answers[j])))",
      "(torch.arange(T) < max(len(answers[i]), len(answers[j])))",
      "token pairs reach into the padding of the shorter answer", "DeepSpeedExamples #316", "reward"),
    M("tail-truncated", "reward.py", "prompt = prompt[-room:]",
      "answers = [a[:max(1, block_size - len(prompt))] for a in answers]",
      "a long comparison loses its end: the answers and their end tokens",
      "train-llm-from-scratch train_reward.py; rlhf-book #503", "reward"),
    M("no-end-in-pairs", "reward.py", "[enc.encode_ordinary(a) + [end] for a in r", "[enc.encode_ordinary(a) for a in r",
      "ranked answers carry no end token", "rasbt/LLMs-from-scratch dpo-from-scratch.ipynb", "reward"),

    # DPO.
    M("dpo-mean", "dpo.py", "return (gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1)",
      "return (gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)",
      "mean instead of sum of the token log-probs", "rasbt/LLMs-from-scratch; minimind #659", "dpo"),
    M("dpo-unshifted", "dpo.py", "return (gpt.token_logprobs(model, ids) * mask[:, 1:]).sum(1)",
      "return (gpt.token_logprobs(model, ids) * mask[:, :-1]).sum(1)",
      "mask and log-probs are not of one frame", "wyf3/llm_related #33", "dpo"),
    M("dpo-no-reference", "dpo.py", "h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
      "h = policy_chosen - policy_rejected",
      "the reference is left out", "Liger-Kernel PR #405", "dpo"),
    M("dpo-swapped", "dpo.py", "h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)",
      "h = (policy_rejected - ref_rejected) - (policy_chosen - ref_chosen)",
      "chosen and rejected in each other's place", "rlhf-book #125 (of the policy loss)", "dpo"),
    M("ipo-target", "dpo.py", "(h - 1 / (2 * beta)) ** 2", "(beta * h - 1 / (2 * beta)) ** 2",
      "IPO's target is a margin of h, not of beta * h", "torchtune PR #1615 (taken out, as it did not work)", "dpo"),
    M("dpo-same-text", "dpo.py", " if answers[i] != answers[j]]", "]",
      "chosen and rejected may be the same text", "rlhf-book #503", "dpo"),

    # Supervised fine-tuning.
    M("prompt-trained", "sft.py", 'said = int(m["role"] == "assistant")', "said = 1",
      "the loss falls on what the user says, too", "nanochat #570; minChatGPT trainers.py", "sft"),
    M("end-untrained", "sft.py", 'add(enc.encode_ordinary(m["content"]) + [end], said)',
      'add(enc.encode_ordinary(m["content"]), said); add([end], 0)',
      "the end token has no loss, so the model never stops", "trl #1623; nanochat chat_rl.py", "sft"),
    M("sft-mask-unshifted", "sft.py", "mask = mask[:, 1:].float()", "mask = mask[:, :-1].float()",
      "the loss mask is off by one", "OpenRLHF #973; verl PR #3287; trlx PR #509", "sft"),
    M("sft-over-padding", "sft.py", "* mask).sum() / mask.sum().clamp(min=1)", "* mask).mean()",
      "mean over all positions: prompt and padding dilute the loss", "minimind #51", "sft"),
    M("specials-parsed", "sft.py", 'enc.encode_ordinary(m["content"])', 'enc.encode(m["content"], allowed_special="all")',
      "a user can spell special tokens", "transformers #29279; vllm PR #31735", "sft"),
    M("user-split-leaks", "sft.py", 'hidden = [r.get("user") is not None and str(r["user"]) in held_out for r in records]',
      "hidden = [i % max(2, round(1 / fraction)) == 0 for i in range(len(records))]",
      "users are on both sides of the split", "arghosh/AKT #9", "sft"),

    # The model.
    M("cache-hides-the-present", "gpt.py", "<= self.lengths[:, None])[:, None, None]",
      "< self.lengths[:, None])[:, None, None]",
      "cached generation differs from the full forward by one position", "nanoGPT PR #613", "gpt"),
    M("cache-shows-garbage", "gpt.py",
      "(torch.arange(self.longest + 1, device=self.k.device) <= self.lengths[:, None])[:, None, None]",
      "(torch.arange(self.longest + 1, device=self.k.device) <= self.longest).repeat(len(self.lengths), 1)[:, None, None]",
      "short rows attend to the padding of long ones", "litgpt #345; unsloth #3699", "gpt"),
    M("position-of-the-longest", "gpt.py", "positions = cache.lengths[:, None]",
      "positions = torch.full_like(cache.lengths, cache.longest)[:, None]",
      "a row's positions depend on its neighbours' padding", "OpenRLHF #217; minimind #541; trlx PR #509", "gpt"),
    M("packed-attention", "gpt.py", "(segments[:, :, None] == segments[:, None, :]).tril()[:, None]",
      "torch.ones_like(segments[:, :, None] == segments[:, None, :]).tril()[:, None]",
      "packed texts attend to each other", "train-llm-from-scratch: rows are cut without document masks", "gpt"),
    M("packed-positions", "gpt.py", "positions = positions - (positions * fresh).cummax(1).values",
      "positions = positions + 0 * segments",
      "a packed text does not start at position 0", "train-llm-from-scratch", "gpt"),
    M("packed-loss", "gpt.py",
      "return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)", "return segments[:, 1:] > 0",
      "the first token of a text is predicted from another text", "train-llm-from-scratch", "gpt"),
    M("scale-of-the-width", "gpt.py", "q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)",
      "q, k, v = q.transpose(1, 2) / self.n_head ** 0.5, k.transpose(1, 2), v.transpose(1, 2)",
      "attention is scaled by sqrt(C), not by sqrt(C / H)", "train-llm-from-scratch PR #3", "gpt"),
    M("causal-off", "gpt.py", "is_causal=mask is None,", "is_causal=False,",
      "tokens see the future", "keras #23038; transformers #48745", "gpt"),
    M("gelu-exact", "gpt.py", 'F.gelu(self.c_fc(x), approximate="tanh")', "F.gelu(self.c_fc(x))",
      "exact GELU where GPT-2 has the tanh form", "nanoGPT #2; LearnRLHF README", "gpt"),
    M("embeddings-untied", "gpt.py", "F.linear(self.hidden(ids, segments=segments), self.wte.weight)",
      "F.linear(self.hidden(ids, segments=segments), self.wte.weight.detach())",
      "the unembedding does not learn with the embedding", "mosaicml/examples PR #11; facebookresearch/lingua #74", "gpt"),

    # Optimisation and checkpoints.
    M("decay-on-layernorm", "gpt.py", '{"params": vectors, "weight_decay": 0.0}',
      '{"params": vectors, "weight_decay": weight_decay}',
      "weight decay on LayerNorm and biases", "Lightning-AI/lit-llama #254", "gpt"),
    M("clip-without-effect", "run.py", "clip_grad_norm_(model.parameters(), clip)",
      "clip_grad_norm_(model.parameters(), math.inf)",
      "gradients are not clipped, as when the call comes before backward", "minChatGPT trainers.py; VGRNN #4", "gpt"),
    M("lr-never-set", "run.py", 'group["lr"] = lr', 'group["lr"] = group["lr"]',
      "the schedule is computed and not used", "kohya-ss/sd-scripts #235", "gpt"),
    M("gradients-kept", "run.py", "optimizer.zero_grad(set_to_none=True)", "pass",
      "old gradients leak into the next step", "thomfoster/minRLHF ppo_trainer.py", "gpt"),
    M("beta2-is-beta1", "gpt.py", "betas=betas, fused=True)", "betas=(betas[0], betas[0]), fused=True)",
      "Adam's two betas are one", "minChatGPT trainers.py", "gpt"),
    M("half-checkpoint", "gpt.py", "save_checkpoint(path, model=model.state_dict(),",
      "save_checkpoint(path, model={k: v.half() for k, v in model.state_dict().items()},",
      "weights are stored in fp16", "minimind trainer_utils.py", "gpt"),
    M("code-in-checkpoint", "run.py", 'map_location="cpu", weights_only=True)', 'map_location="cpu", weights_only=False)',
      "a checkpoint may run code", "the default of torch.load before 2.6", "gpt"),

    # The same run again.
    M("resume-without-rng", "run.py", "set_random_states(self.saved[\"random\"])", "pass",
      "a resumed run draws other dropout and other samples", "transformers #17032", "run"),
    M("resume-replays-batches", "run.py", "restore(part, self.saved[\"parts\"][name])",
      "name == \"rng\" or restore(part, self.saved[\"parts\"][name])",
      "a resumed run reads the first batches again", "nanoGPT train.py", "run"),
    M("resume-without-optimizer", "run.py", "restore(part, self.saved[\"parts\"][name])",
      "name == \"optimizer\" or restore(part, self.saved[\"parts\"][name])",
      "Adam starts from nothing in the middle of a run", "OneVision-Encoder PR #65", "run"),
    M("rows-twice", "run.py", "os.truncate(self.log_path, min(self.saved[\"log_bytes\"], self.log_path.stat().st_size))", "pass",
      "steps that are done again are logged twice", "musubi-tuner PR #1011", "run"),
    M("nan-steps-on", "run.py", "if not (math.isfinite(norm) and math.isfinite(loss.item())):", "if False:",
      "a NaN goes into every weight, and training goes on", "Megatron-LLM #33", "run"),
    M("mean-of-means", "run.py", "return loss * (n * world() / total)", "return loss",
      "the mean over processes of means over unequal shares", "transformers #34191, #34373", "run"),

    # With fewer humans.
    M("rouge-case", "self_instruct.py", "text.lower()).split()", "text).split()",
      "ROUGE without lower case: a capital makes a word new", "promptfoo PR #9739", "self_instruct"),
    M("instance-cut-off", "self_instruct.py", '[:None if ended or "\\nTask:" in text else -1]', "",
      "an instance that was cut off is kept", "stanford_alpaca generate_instruction.py guards against it", "self_instruct"),
    M("equal-scores-kept", "self_reward.py", "if values[best] == values[worst]:", "if False:",
      "answers of equal score become a pair", "rlhf-book #503 (chosen and rejected alike)", "self_reward"),
    M("unparsed-is-0", "self_reward.py", "read = [s for s in scores if s is not None and not math.isnan(s)]",
      "read = [s or 0.0 for s in scores]",
      "a verdict that cannot be read is a score of 0", "manthanguptaa/water #57", "self_reward"),
    M("first-number", "self_reward.py", "float(found[-1]) if found", "float(found[0]) if found",
      "the first number of a verdict is taken for its score", "openagent-eval #74", "self_reward"),
    M("no-replay", "self_reward.py", "if cfg.replay:", "if cfg.replay < 0:",
      "the judge's data are not replayed, and it forgets", "InstructGPT C.4 (the same without ptx)", "self_reward"),
    M("ties-are-wins", "eval.py", "[0.5 + 0.5 * ((g > o) - (g < o)) for", "[float(g >= o) for",
      "the new model wins where nobody does", "minChatGPT evaluate.py (the new answer is always B)", "eval"),

    # Tools.
    M("result-trained", "tools.py", "((prompt, call), (head, tail))", "((prompt, call), (prompt, head[len(prompt):] + tail))",
      "the model learns to say what the tool says", "verl-tool #116", "tools"),
    M("database-writable", "tools.py", "?mode=ro", "?mode=rw",
      "the model's SQL runs on a connection that may write", "xlang-ai/OpenAgents #158", "tools"),
]


def mutated(m, text):
    """The text of m.file with the bug in it; raises ValueError where `old` does not stand exactly once."""
    n = text.count(m.old)
    if n != 1:
        raise ValueError(f"{m.name}: its old text stands {n} times in {m.file}, not once: {m.old!r}")
    return text.replace(m.old, m.new)


def copy_tree(source, target):
    """What tests need, and nothing that they or a run have made."""
    skip = shutil.ignore_patterns("out", ".*", "venv", "*.part")
    shutil.copytree(source, target, ignore=skip)   # mtimes are kept, so compiled test modules stay valid
    return target


def pytest_in(tree, paths, report):
    """The body of a process: pytest on the copy, its words into the file `report`, its exit code ours."""
    import pytest
    out = os.open(report, os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.path[:] = [str(tree)] + [p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests")]
    os.chdir(tree)
    code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *paths])
    sys.stdout.flush()
    os._exit(int(code))


def run_tests(tree, modules, limit):
    """-> ("passed" | "killed" | "broken", what pytest says of it). In a process of its own, forked where that exists: torch, the
    same for all of them, is then imported once (by main), and the project itself never here."""
    report, fork = Path(f"{tree}.txt"), "fork" in multiprocessing.get_all_start_methods()
    process = multiprocessing.get_context("fork" if fork else "spawn").Process(
        target=pytest_in, args=(tree, [f"tests/test_{m}.py" for m in modules], report))
    process.start()
    process.join(limit)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "killed", f"time limit of {limit} s"
    said = report.read_text(encoding="utf-8", errors="replace")
    # Only a test that fails is a kill; what cannot be collected or set up says ERROR.
    failed = re.search(r"^FAILED tests/test_(\S+)\.py::([^\s\[]+)", said, re.M)
    if process.exitcode == 0:
        return "passed", ""
    if process.exitcode == 1 and failed:
        return "killed", f"{failed[1]}: {failed[2]}"
    return "broken", (re.findall(r"^(?:ERROR|E  ).*", said, re.M) or said.strip().splitlines() or ["?"])[-1]


def judge(m, base, folder, limit=LIMIT):
    """Put one mutant into a copy of the tree `base` and run its tests -> (verdict, test)."""
    tree = copy_tree(base, Path(folder) / m.name)
    try:
        path = tree / m.file
        path.write_text(mutated(m, path.read_text(encoding="utf-8")), encoding="utf-8")
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*.pyc"):
            compiled.unlink()
        verdict, test = run_tests(tree, m.tests.split(), limit)
        return {"passed": "SURVIVED", "broken": "BROKEN"}.get(verdict, verdict), test
    finally:
        shutil.rmtree(tree)


def table(rows):
    """Rows (mutant, test) -> Markdown."""
    lines = ["| mutant | file | the bug, as published | killed by |", "|---|---|---|---|"]
    for m, test in rows:
        module, _, name = test.partition(": ")
        cells = f"`{m.name}`", m.file, f"{m.bug} ({m.published})", f"{module}: `{name}`" if name else test
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(lines)


def write_table(rows):
    text = README.read_text(encoding="utf-8") if README.exists() else f"# Tests\n\n{BEGIN}\n{END}\n"
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{README}: wants one line {BEGIN} and one line {END}")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text(f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}", encoding="utf-8")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants to run; none: all of them")
    parser.add_argument("--list", action="store_true", help="print them and run nothing")
    parser.add_argument("--show", metavar="NAME", help="print the change of one mutant")
    parser.add_argument("--sample", type=int, metavar="N", help="N of them, by lot")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--write", action="store_true", help=f"write the table into {README.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    by_name = {m.name: m for m in MUTANTS}
    unknown = [n for n in args.names + [args.show] * bool(args.show) if n not in by_name]
    if unknown:
        sys.exit(f"no such mutant: {', '.join(unknown)}; see --list")
    if args.write and (args.names or args.sample):
        sys.exit("--write wants all of them, or the table would lose the others")
    if args.show:
        m = by_name[args.show]
        return print(f"{m.file}: {m.bug} ({m.published})\n- {m.old}\n+ {m.new}")
    chosen = [by_name[n] for n in args.names] or list(MUTANTS)
    if args.sample:
        chosen = random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))
    if args.list:
        return print("\n".join(f"{m.name:26} {m.file:16} {m.bug}" for m in chosen))
    os.environ["OMP_NUM_THREADS"] = "1"   # one core; and a process may be forked only while torch has no threads
    os.environ.pop("PYTHONPATH", None)
    import tiktoken, torch, pytest   # noqa: F401, for the forks
    torch.optim.AdamW([torch.zeros(1)])   # the first optimizer imports half of torch, two seconds of it
    start, rows, bad = time.time(), [], []
    with tempfile.TemporaryDirectory() as folder:
        base = copy_tree(ROOT, Path(folder) / "unchanged")
        modules = list(dict.fromkeys(t for m in chosen for t in m.tests.split()))
        verdict, test = run_tests(base, modules, 10 * LIMIT)   # also compiles the test modules, once for all copies
        print(f"unchanged: {verdict} {test} ({time.time() - start:.0f} s)", flush=True)
        if verdict != "passed":
            sys.exit("the tests fail without any mutant; mend that first")
        for i, m in enumerate(chosen, 1):
            try:
                verdict, test = judge(m, base, folder)
            except ValueError as e:
                verdict, test = "ERROR", str(e)
            rows.append((m, test))
            bad += [m.name] * (verdict != "killed")
            print(f"{i:3d}/{len(chosen)}  {verdict:8}  {m.name:26} {m.file:16} {test}", flush=True)
    not_killed = f"; not: {', '.join(bad)}" if bad else ""
    took = f"{time.time() - start:.0f} s, {sum(os.times()[:4]):.0f} s of one processor"   # others may share the machine
    print(f"{len(rows) - len(bad)} of {len(rows)} killed in {took}{not_killed}")
    if args.write and not bad:
        write_table(rows)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())

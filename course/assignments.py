"""The assignments: which functions are cut out of which file, what they teach, what they are worth.

An anchor is the beginning of a statement of the function's body, which stands there exactly once.
What stands before it (docstring and guards) stays; the rest is cut. If the code moves on, the tests
say so: anchors, docstring lines and bugs must all be found.

Numbers to reproduce are bands over the seeds in results/, computed when a handout is made.
"""
from typing import NamedTuple


class Concept(NamedTuple):
    """A property of a function: a group of cases of course/probes.py."""
    name: str
    points: int
    line: str    # the words of the docstring that decide it
    shows: str   # what training would show without it


class Part(NamedTuple):
    """Functions that are graded together; the first one is called."""
    name: str         # the key in course/probes.py
    file: str
    cuts: dict        # {"function" or "Class.method": anchor}
    concepts: tuple
    bugs: str = ""    # names of mutants of tests/zoo.py; course/mistakes.py adds to them


class Band(NamedTuple):
    """A number of the published runs: mean and range over their seeds."""
    says: str         # what it is
    runs: str         # results/RUNS-seed*.jsonl
    key: str
    where: dict = {}  # of the rows, the last one with these values counts
    form: str = ".2f"


class Twist(NamedTuple):
    """A changed specification, for which the public code is wrong."""
    name: str
    part: str
    says: str     # {x} is the drawn value
    values: tuple
    old: str      # the change of the reference
    new: str


class Assignment(NamedTuple):
    name: str
    title: str
    goal: str
    level: int    # 1 to 3
    hours: int    # an estimate
    parts: tuple
    finish: str   # the command that ends the assignment
    bands: tuple
    twists: tuple = ()
    also: tuple = ()      # (file, function, anchor) to cut because it repeats the solution
    kind: str = ""        # of assignments without code: prediction or hunt
    concepts: tuple = ()  # of these
    task: str = ""        # what students of these read; {k} is filled in


SHIFTED = "The loss falls to almost nothing: the model reads each token off. Samples are nonsense."
PADDING = "The numbers change with the batch: whoever shares a batch with a long row learns less."
NO_GRADIENT = "The critic is pulled towards what helps the policy; explained variance falls."

A1 = Assignment(
    "A1", "Log-probabilities", "one frame for logits and targets", 1, 1,
    (
        Part("cross_entropy", "scaffold/optim.py", {"cross_entropy": 'each = "none"'}, (
            Concept("the loss", 2, "F.cross_entropy in fp32 of the logits of some states",
                    "Nothing is learned."),
            Concept("reduction", 1, "(N,), or a scalar", "Steps grow with the batch."),
            Concept("temperature", 2, "temperature",
                    "val/ratio_first is not 1 as soon as the temperature is not 1."),
            Concept("fp32", 1, "in fp32", "The ratio of nearly equal policies is noise."),
            Concept("at most LOGITS logits", 1, "At most LOGITS logits exist at a time",
                    "A large vocabulary runs out of memory."),
        ), "temperature-forgotten temperature-twice half-logprobs"),
        Part("token_logprobs", "gpt.py", {"token_logprobs": "if states is None"}, (
            Concept("the frame", 3, "log p(ids[:, t+1] | ids[:, :t+1]) at index t", SHIFTED),
            Concept("temperature", 1, "temperature=1.0",
                    "val/ratio_first is not 1 as soon as the temperature is not 1."),
            Concept("the mask", 2, "With a mask (B, T-1), it is 0 elsewhere", PADDING),
            Concept("parts", 1, "parts: see in_parts", "--grad-accum changes the numbers."),
            Concept("states are used", 1, "states: model.hidden(ids)",
                    "The reward model computes everything twice."),
            Concept("fp32", 1, "fp32", "The ratio of nearly equal policies is noise."),
        ), "logprobs-late"),
        Part("predicted", "data/text.py", {"predicted": "return (segments"}, (
            Concept("inside a document", 2, "where the next token belongs to the same document",
                    "The loss stays higher: a document's first token cannot be guessed."),
            Concept("padding", 1, "where the next token belongs to the same document", PADDING),
        ), "packed-loss"),
    ),
    "python gpt.py",
    (Band("loss on held-out text", "gpt", "val_loss"),),
)

A2 = Assignment(
    "A2", "Attention and packing", "causality; many documents in one row", 2, 3,
    (
        Part("attention", "gpt.py", {"Attention.forward": "B, T, C = x.shape"}, (
            Concept("attention", 3, "softmax(q k' / sqrt(d)) v over all earlier positions",
                    "The loss stops at that of single words."),
            Concept("causal", 2, "causal: p never sees x_{t+1}", SHIFTED),
            Concept("the mask", 1, "over all earlier positions", "Packed documents mix."),
            Concept("the cache", 2, "over all earlier positions",
                    "Samples are worse than the loss promises."),
        ), "scale-of-the-width causal-off"),
        Part("mlp", "gpt.py", {"MLP.forward": "return self.c_proj(F.gelu"}, (
            Concept("tanh GELU", 1, "4C wide, tanh GELU",
                    "Nothing, until GPT-2's weights are loaded: their outputs are slightly off."),
        ), "gelu-exact"),
        Part("hidden", "gpt.py", {"GPT.hidden": "T = ids.shape[1]"}, (
            Concept("embeddings and blocks", 3, "the states after the last LayerNorm (B, T, C)",
                    "Nothing is learned."),
            Concept("packed rows", 3, "each starts at position 0 and attends only to itself",
                    "The loss on packed rows is not that of the same documents alone."),
            Concept("positions of the cache", 1, "Map token ids (B, T) to the states",
                    "Samples repeat themselves."),
            Concept("lengths", 1, "how many states each row needs", "Steps take longer."),
        ), "packed-attention packed-positions"),
        Part("unembed", "gpt.py", {"GPT.unembed": "return F.linear"}, (
            Concept("tied weights", 1, "Map states (..., C) to logits (..., V)",
                    "The loss falls more slowly."),
        ), "embeddings-untied"),
    ),
    "python gpt.py",
    (Band("loss on held-out text", "gpt", "val_loss"),
     Band("bits per byte", "gpt", "bits_per_byte", form=".3f")),
)

A3 = Assignment(
    "A3", "The cache and sampling", "cached generation equals the full forward pass", 3, 3,
    (
        Part("cache", "gpt.py", {"KVCache.open_slots": "if self.longest",
                                 "KVCache.attend": "D = q.shape[-1]"}, (
            Concept("positions", 1, "return positions (B, 1)", "Short rows of a batch ramble."),
            Concept("attention over the past", 3, "let q attend to it and those before",
                    "Samples are worse than the loss promises."),
            Concept("padding", 2, "mask those after it", "A response depends on its batch."),
            Concept("rows are independent", 2, "for each row's new token",
                    "A response depends on its batch."),
        ), "cache-hides-the-present cache-shows-garbage position-of-the-longest"),
        Part("sample_tokens", "gpt.py", {"sample_tokens": "if temperature < 1e-6"}, (
            Concept("the distribution", 2, "Sample one id per row", "KL to sft is not 0 at first."),
            Concept("greedy", 1, "temperature 0 is greedy", "Two greedy runs differ."),
            Concept("temperature", 1, "temperature", "KL to sft is not 0 at first."),
            Concept("top_k", 1, "after top_k and top_p", "Rare nonsense in samples."),
            Concept("top_p", 2, "after top_k and top_p", "Samples are dull."),
            Concept("the generator", 1, "rng=None", "The same seed gives other samples."),
        ), "top-p-short"),
        Part("generate", "gpt.py", {"generate": "was_training = "}, (
            Concept("ragged prompts", 3, "Continue a ragged batch of prompts",
                    "Short prompts get worse answers than long ones."),
            Concept("rows are independent", 1, "one list of new ids per prompt",
                    "A response depends on its batch."),
            Concept("the end", 2, "A row ends with `stop` (included)",
                    "val/num_eos_tokens is 0, or responses are cut."),
            Concept("no dropout, the mode is restored", 1, "Returns one list of new ids",
                    "Samples are worse with --dropout; later training has no dropout."),
        ), "sampling-with-dropout"),
    ),
    "python chat.py", (),
    also=(("data/beam.py", "beam_search", "device = "),),   # fills and keeps the cache as generate
)

A4 = Assignment(
    "A4", "Chats and their loss", "who is trained on what", 1, 2,
    (
        Part("render", "sft.py", {"render": "ids, mask = [], []"}, (
            Concept("tokens", 2, "Turn [{\"role\", \"content\"}] into (ids, mask)",
                    "Every prompt looks strange to the model: its loss stays high."),
            Concept("mask", 3, "The mask is 1 exactly on the assistant's text and its end token",
                    "Without the end token responses never stop; with the prompt the loss is of "
                    "other words than those the model should say."),
            Concept("ordinary text", 1, "so it cannot produce special tokens",
                    "Nothing, until a user types a special token and speaks as the assistant."),
        ), "prompt-trained end-untrained specials-parsed"),
        Part("response_loss", "sft.py", {"response_loss": "mask = mask[:, 1:].bool()"}, (
            Concept("right tokens", 3, "the shift by one happens here",
                    "The loss falls quickly and the samples are nonsense: the model learns to "
                    "repeat the token that it sees."),
            Concept("padding", 1, "Mean cross-entropy of the masked tokens", PADDING),
            Concept("empty mask", 1, "Mean cross-entropy of the masked tokens",
                    "One chat without a response turns all weights into NaN."),
        )),
        Part("chat_loss", "sft.py", {"chat_loss": "mask = mask[:, 1:]  "}, (
            Concept("right tokens", 3, "Return response_loss without the logits of the prompt",
                    "The loss is trained on the wrong token of each pair."),
            Concept("padding", 1, "Return response_loss", PADDING),
            Concept("empty mask", 1, "Return response_loss",
                    "One chat without a response turns all weights into NaN."),
        ), "sft-mask-unshifted sft-over-padding"),
        Part("split_by_user", "data/formats.py", {"split_by_user": "groups = users_of"}, (
            Concept("no user in both", 2, "that share no user",
                    "Validation loss is too good: its users were trained on."),
            Concept("no prompt in both", 2, "the parts share no prompt instead",
                    "Validation loss is too good: its prompts were trained on."),
            Concept("the seed decides", 1, "Split records into (train, validation)",
                    "Two runs of one seed differ."),
            Concept("no user is for training", 1, "those without one are for training",
                    "Validation has records of unknown users, who may be those of training."),
            Concept("a single group", 1, "both parts are all records",
                    "A file with one prompt cannot be used."),
        ), "user-split-leaks prompt-split-leaks"),
    ),
    "python sft.py && python evaluate.py",
    (Band("gold of sft", "eval", "gold", {"stage": "sft"}),
     Band("validation loss after the last epoch", "sft", "val_loss")),
)

A5 = Assignment(
    "A5", "The ranking loss", "from rankings to a scalar", 2, 2,
    (
        Part("pair_mask", "reward.py", {"pair_mask": "present ="}, (
            Concept("who is better", 2, "Mark the pairs whose first response is better",
                    "Accuracy is below one half."),
            Concept("ties", 1, "Rank 1 is best", "Scores of equal responses drift apart."),
            Concept("absent responses", 1, "rank 0 marks an absent response",
                    "Prompts with fewer responses train on padding."),
        ), "ties-as-pairs"),
        Part("ranking_loss", "reward.py", {"ranking_loss": "losses = "}, (
            Concept("the loss", 3, "-log sigmoid(r_w - r_l)", "Accuracy stays at one half, or "
                    "falls below it."),
            Concept("mean over pairs, then prompts", 2, "mean over the pairs of a prompt, then "
                    "over the prompts", "Prompts with many responses count for more."),
            Concept("stable", 1, "-log sigmoid(r_w - r_l)", "The loss is inf after a bad step."),
            Concept("no pair", 1, "Raises UserError if no prompt has one", "NaN."),
        ), "ranking-sign log-of-sigmoid kwise-twice"),
        Part("score", "reward.py", {"RewardModel.score": "return self(ids"}, (
            Concept("the last real token", 2, "Score at the last real token",
                    "Accuracy is that of a model that has not seen the end."),
            Concept("padding", 2, "Score at the last real token",
                    "The score of a response depends on its batch."),
        ), "score-at-the-last-column score-one-early score-mean-over-time"),
        Part("tokenize", "data/rankings.py", {"tokenize": "comparisons, cut, lost"}, (
            Concept("prompt, response, end", 2, "Tokenize ranked responses",
                    "The score never sees the end token that PPO will show it."),
            Concept("the prompt is cut at its beginning", 1, "A prompt too long for the context "
                    "loses its beginning", "Long comparisons lose what was ranked."),
            Concept("what does not fit is left out", 1, "is skipped", "A crash on long responses."),
        ), "tail-truncated no-end-in-pairs"),
    ),
    "python reward.py",
    (Band("accuracy on held-out users", "reward", "accuracy", {"split": "held-out users"}, ".3f"),
     Band("the ceiling: the gold program", "reward", "gold_program",
          {"split": "held-out users"}, ".3f")),
    (
        Twist("margin", "ranking_loss", "a better response should score higher by at least {x}: "
              "the loss of a pair is -log sigmoid(r_w - r_l - {x}).", (0.25, 0.5, 1.0),
              "scores[:, :, None] - scores[:, None, :]) * pairs",
              "scores[:, :, None] - scores[:, None, :] - {x}) * pairs"),
    ),
)

A6 = Assignment(
    "A6", "What a token is paid", "the mask, the KL penalty, the score", 2, 2,
    (
        Part("response_mask", "ppo.py", {"response_mask": "target ="}, (
            Concept("response tokens and the end", 3, "Mark the actions that produced response "
                    "tokens", "val/num_eos_tokens falls, or the prompt is trained."),
            Concept("an empty response", 1, "(B,), (B,) -> (B, T-1)", "Nothing, usually."),
        ), "mask-early mask-late end-masked"),
        Part("kl_rewards", "ppo.py", {"kl_rewards": "mask = mask.bool()"}, (
            Concept("penalty and score", 3, "-beta * (log pi - log pi_ref) on each, plus the score",
                    "objective/kl runs away, or nothing moves."),
            Concept("the score on the last token", 2, "plus the score on the last",
                    "Long responses earn more, or the score is never paid."),
            Concept("the penalty", 2, "The penalty is the log-ratio", "objective/kl drifts."),
            Concept("padding", 1, "0 outside the mask", PADDING),
            Concept("an empty response", 1, "A row without response tokens gets no score",
                    "A score is paid on the prompt."),
        ), "kl-sign k3-in-the-reward kl-clipped kl-of-padding score-after-the-end "
           "score-everywhere"),
    ),
    "python ppo.py",
    (Band("objective/kl at the end", "ppo", "objective/kl"),),
    (
        Twist("squared-penalty", "kl_rewards", "the penalty of a token is beta times {x} times the "
              "square of its log-ratio (k2).", (0.5, 1.0, 2.0),
              "-beta * (logprobs - ref_logprobs)",
              "-beta * {x} * (logprobs - ref_logprobs) ** 2"),
    ),
)

A7 = Assignment(
    "A7", "Advantages", "which token deserves the credit", 2, 2,
    (
        Part("gae", "gae.py", {"gae": "dtype = "}, (
            Concept("the recursion", 3, "gamma, lam       discount and GAE's lambda",
                    "The critic's targets are wrong: explained variance stays low."),
            Concept("end of the response", 2, "outside it, rewards and values may be anything",
                    "Nobody knows what a critic says behind the end. It leaks into the last "
                    "token, the one that carries the score."),
            Concept("padding", 1, "even NaN", "One NaN on padding stops the run."),
            Concept("returns", 1, "advantages + values is V's target in the reward's units",
                    "loss/value_avg does not fall; explained variance is near 0."),
            Concept("no gradient", 1, "without gradient", NO_GRADIENT),
        ), "values-after-the-end bootstrap gae-unmasked lambda-gamma rewards-shifted "
           "returns-are-rewards whiten-before-returns"),
        Part("whiten", "gae.py", {"whiten": "mask = mask.bool()"}, (
            Concept("mean 0, variance 1", 2, "mean 0 and variance 1 (biased, eps 1e-8)",
                    "The size of the policy's steps follows the scale of the scores."),
            Concept("over the batch", 2, "Over the batch, never per row",
                    "Per row, every response gets as much praise as blame: gold does not rise."),
            Concept("padding", 1, "x outside the mask may be anything", PADDING),
            Concept("a single element", 1, "A single element gives 0", "0/0 is NaN."),
            Concept("no gradient", 1, "without gradient", NO_GRADIENT),
        ), "whiten-mean-kept whiten-per-row whiten-over-padding"),
    ),
    "python gae.py", (),
    (
        Twist("whiten-scale-only", "whiten",
              "whiten keeps the mean of x: it only divides by the standard deviation around that "
              "mean, and then multiplies the result by {x}.", (0.5, 2.0, 3.0),
              "    x = torch.where(mask, x - x.sum() / n, 0)\n"
              "    return x * torch.rsqrt(x.square().sum() / n + 1e-8)",
              "    kept = torch.where(mask, x, 0)\n"
              "    x = torch.where(mask, x - x.sum() / n, 0)\n"
              "    return {x} * kept * torch.rsqrt(x.square().sum() / n + 1e-8)"),
        Twist("bootstrap-at-truncation", "gae",
              "every response was cut for length: the value after its last token is not 0 but "
              "{x} times the value of the state before that token.", (0.5, 0.8, 1.0),
              "        delta = rewards[:, t]",
              "        ends = mask[:, t] & ~mask[:, t + 1:t + 2].any(1)\n"
              "        next_value = torch.where(ends, {x} * values[:, t], next_value)\n"
              "        delta = rewards[:, t]"),
    ),
)

A8 = Assignment(
    "A8", "PPO's losses", "the clip", 2, 2,
    (
        Part("masked_mean", "scaffold/health.py", {"masked_mean": "return (x * mask)"}, (
            Concept("the mean", 1, "Mean of x over the mask", "Every loss has the wrong size."),
            Concept("padding", 1, "Mean of x over the mask", PADDING),
            Concept("an empty mask", 1, "0 for an empty mask", "0/0 is NaN and stops the run."),
        ), "masked-but-divided-by-all"),
        Part("policy_loss", "ppo.py", {"policy_loss": "mask = mask.float()"}, (
            Concept("the surrogate", 3, "PPO's clipped surrogate (1707.06347, eq. 7)",
                    "With a wrong sign the score falls; with a wrong clip the KL runs away."),
            Concept("clipped tokens have no gradient", 2, "the token's loss is flat",
                    "policy/approxkl_avg grows within an update; the KL runs away."),
            Concept("the ratio is 1 at first", 1, "All (B, T-1) -> (loss, clip fraction)",
                    "val/ratio_first is not 1."),
            Concept("clip fraction", 1, "(loss, clip fraction)",
                    "policy/clipfrac_avg says nothing about the step size."),
            Concept("padding", 1, "mean over the masked tokens", PADDING),
            Concept("nothing else changes", 1, "(loss, clip fraction)",
                    "Later epochs of the update train on changed numbers."),
        ), "ratio-inverse clip-inert policy-sign policy-over-padding"),
        Part("value_loss", "ppo.py", {"value_loss": "clipped = old_values"}, (
            Concept("the larger error", 3, "per token the larger of the errors of V and clipped V",
                    "The critic jumps: explained variance swings from update to update."),
            Concept("half the squared error", 1, "Half the mean squared error of V",
                    "The critic's steps are twice as large as the learning rate says."),
            Concept("padding", 1, "Half the mean squared error of V", PADDING),
        ), "value-over-padding value-clip-min"),
    ),
    "python ppo.py",
    (Band("policy/clipfrac_avg at the end", "ppo", "policy/clipfrac_avg", form=".3f"),
     Band("gold of ppo", "eval", "gold", {"stage": "ppo"})),
)

A9 = Assignment(
    "A9", "The rollout", "four models, one distribution", 3, 3,
    (
        Part("rollout", "ppo.py", {"rollout": "responses = gpt.generate"}, (
            Concept("sampling at temperature 1, to the end token", 3, "Sample a response to each "
                    "prompt", "objective/kl is negative, or responses never end."),
            Concept("the mask", 1, "run all four models on it", PADDING),
            Concept("log-probs of three models", 2, "run all four models on it",
                    "val/ratio_first is not 1, objective/kl is 0 or wrong."),
            Concept("old is the sampler", 1, "run all four models on it",
                    "--offline learns from a ratio that is always 1."),
            Concept("values before the action", 2, "run all four models on it",
                    "Explained variance is too good: the critic has seen the action."),
            Concept("scores", 2, "run all four models on it", "Responses grow without an end."),
        ), "values-late reward-before-the-end missing-end-free no-stop top-k-rollout cool-rollout "
           "old-is-not-the-sampler"),
        Part("losses", "ppo.py", {"losses": "T = int"}, (
            Concept("policy loss", 3, "(policy loss, value loss, statistics)", "Nothing learns."),
            Concept("value loss", 3, "(policy loss, value loss, statistics)",
                    "val/explained_variance stays where it began."),
            Concept("approxkl", 1, "statistics", "--stop-kl never stops, or always."),
            Concept("other statistics", 1, "statistics", "The log misleads."),
        ), "critic-dead early-stop-sign"),
    ),
    "python ppo.py",
    (Band("val/ratio_first", "ppo", "val/ratio_first", form=".6f"),
     Band("gold of ppo", "eval", "gold", {"stage": "ppo"})),
)

A10 = Assignment(
    "A10", "Predict, then run", "over-optimisation of a reward model", 1, 1, (),
    "python ppo.py --beta 0 --name ppo-beta-0 --updates 150", (),
    kind="prediction",
    concepts=(
        Concept("predictions", 2, "", ""),
        Concept("measured", 3, "", ""),
        Concept("surprise", 1, "", ""),
    ),
    task="""Nothing to write: predict, then run. Put your predictions into A10.json before the run:

    {"last score": 0.0, "last gold": 0.0, "highest gold": 0.0, "its update": 0, "why": "..."}

for `python ppo.py --beta 0 --name ppo-beta-0 --updates 150`. Then run it and add `"measured"` with
the same four numbers, means over nine neighbouring updates of out/ppo-beta-0.jsonl, and
`"surprise"`: what you had not expected, and the samples that show it. `check A10` compares your
numbers with your own log.""",
)

A11 = Assignment(
    "A11", "DPO", "preferences without a reward model", 2, 2,
    (
        Part("dpo_loss", "dpo.py", {"dpo_loss": "chosen = policy_chosen"}, (
            Concept("the loss", 3, "kind \"sigmoid\" is DPO", "rewards/accuracies stays at .5."),
            Concept("stable", 1, "log sigmoid", "The loss is inf after a bad step."),
            Concept("rewards", 1, "beta * (log pi - log pi_ref), detached",
                    "rewards/margins has no meaning."),
            Concept("label smoothing", 1, "With label_smoothing e it is cDPO", "Overfits noise."),
            Concept("ipo", 1, "(h - 1/(2 beta))^2", "The margin goes to another place."),
        ), "dpo-no-reference dpo-swapped ipo-target"),
        Part("response_logprobs", "dpo.py", {"response_logprobs": "return gpt.token_logprobs"}, (
            Concept("sum over the response", 2, "log pi(y|x) of whole responses",
                    "Beta loses its meaning; short responses win."),
            Concept("padding", 1, "the mask is 1 on y", PADDING),
        ), "dpo-mean dpo-unshifted"),
        Part("choose_pairs", "data/rankings.py", {"choose_pairs": "in_fp32"}, (
            Concept("all pairs, better first", 2, "Return pairs (better, worse)",
                    "rewards/accuracies on held-out pairs is below .5."),
            Concept("equal responses", 1, "skip ties and equal responses",
                    "Pairs whose loss is log 2, whatever the model does."),
            Concept("ties", 1, "skip ties", "Noise is trained."),
            Concept("extreme", 1, "extreme (the widest difference in rank)", "Other pairs."),
            Concept("random", 1, "random (one pair)", "Fewer or other pairs."),
        ), "dpo-same-text"),
    ),
    "python dpo.py && python evaluate.py",
    (Band("gold of dpo", "eval", "gold", {"stage": "dpo"}),
     Band("its win rate against sft", "eval", "win_rate_vs_sft", {"stage": "dpo"}, ".0%")),
    (
        Twist("margin", "dpo_loss", "the sigmoid loss wants a margin: h is the difference of the "
              "log-ratios minus {x}, for both kinds.", (0.5, 1.0, 2.0),
              "    h = chosen - rejected\n", "    h = chosen - rejected - {x}\n"),
    ),
)

A12 = Assignment(
    "A12", "Honest evaluation", "intervals and ties", 1, 1,
    (
        Part("mean_and_ci", "data/exam.py", {"mean_and_ci": "if len(values)"}, (
            Concept("the mean", 1, "the mean of a list", "The table is wrong."),
            Concept("the interval", 3, "the half-width of its 95% interval",
                    "You report differences that are noise."),
            Concept("one value", 1, "NaN for one value", "A crash, or a false certainty."),
        )),
        Part("win_rate", "data/exam.py", {"win_rate": "return mean_and_ci"}, (
            Concept("ties count half", 2, "half of the ties", "A model beats its own copy."),
            Concept("wins", 2, "the share of pairs in which mine is larger",
                    "The better model loses."),
        ), "ties-are-wins"),
    ),
    "python evaluate.py",
    (Band("gold of best-of-16", "eval", "gold", {"stage": "best-of-16"}),
     Band("its win rate against sft", "eval", "win_rate_vs_sft", {"stage": "best-of-16"}, ".0%")),
)

A13 = Assignment(
    "A13", "A judge is data", "an unreadable verdict is no verdict", 2, 2,
    (
        Part("parse_score", "data/verdicts.py", {"parse_score": "found ="}, (
            Concept("the score", 2, "Read the last 'Score: n'", "No response gets a score."),
            Concept("the last score", 2, "the last 'Score: n'", "The reasons count as the score."),
            Concept("None", 2, "None if it is missing or n exceeds max_score",
                    "Broken verdicts decide pairs."),
        ), "first-number"),
        Part("mean_score", "data/verdicts.py", {"mean_score": "read ="}, (
            Concept("the mean", 1, "Average the readable scores", "Pairs are random."),
            Concept("unreadable is not 0", 2, "An unreadable verdict is not a zero",
                    "Good responses are rejected because a verdict was cut off."),
            Concept("0 is a score", 1, "the readable scores", "The worst responses get no score."),
            Concept("None", 1, "None if no score is readable", "A crash."),
        ), "unparsed-is-0"),
        Part("make_pairs", "self_reward.py", {"make_pairs": "pairs = []"}, (
            Concept("highest against lowest", 3, "Pair the highest with the lowest score",
                    "own score does not rise from round to round."),
            Concept("no pair without a difference", 1, "the reasons why the other prompts have no "
                    "pair", "DPO trains on noise."),
            Concept("the margin", 1, "margin", "DPO trains on noise."),
            Concept("not judged", 1, "None (not judged)", "A crash, or invented zeros."),
        ), "equal-scores-kept"),
    ),
    "python self_reward.py",
    tuple(Band(f"gold of {m}", "self_reward-main", "gold", {"stage": m}) for m in
          ("M1", "M2", "M3", "M4")),
)

A14 = Assignment(
    "A14", "Bug hunt", "diagnosis from logs", 3, 3, (), "python ppo.py",
    (Band("gold of ppo without bugs", "eval", "gold", {"stage": "ppo"}),
     Band("explained variance at the end", "ppo", "val/explained_variance")),
    kind="hunt",
    concepts=tuple(Concept(f"bug {n}", 4, "", "") for n in (1, 2, 3)),
    task="""This tree has {k} published bugs in it. Nothing crashes. Train, read the logs, and find
them. Write A14.json: a list of {k} entries

    [{"file": "ppo.py", "line": 123, "metric": "val/ratio_first", "why": "what the log shows"}]

`line` is the line in your tree. `check A14` says which entries are right, by file and line. The
marks are for `metric` and `why`, which your teacher reads: anyone can find a line with diff.""",
)

HUNT = ("mask-early mask-late values-late end-masked missing-end-free top-k-rollout cool-rollout "
        "kl-sign kl-of-padding score-after-the-end ratio-inverse policy-sign critic-dead "
        "values-after-the-end rewards-shifted returns-are-rewards not-whitened ranking-sign "
        "score-one-early prompt-trained end-untrained reference-is-the-policy lr-never-set "
        "gradients-kept causal-off").split()   # chosen because they should show in a log

ASSIGNMENTS = {a.name: a for a in (A1, A2, A3, A4, A5, A6, A7, A8, A9, A10, A11, A12, A13, A14)}

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


PADDING = "The numbers change with the batch: whoever shares a batch with a long row learns less."
NO_GRADIENT = "The critic is pulled towards what helps the policy; explained variance falls."

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
            Concept("clipped tokens have no gradient", 2, "its loss is flat and has no gradient",
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

ASSIGNMENTS = {a.name: a for a in (A4, A7, A8)}

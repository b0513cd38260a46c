"""How to read the metrics of a training run: a line for each panel of its charts, as report/charts.py names them."""

from collections.abc import Iterable

from report.markup import section, text

TERM = "term/"
MEANINGS = {
    "loss": "what is minimized, the sum of the terms below; lower is better, comparable only with the same loss",
    "lr": "learning rate of the step",
    "grad_norm": "length of the gradient before it is clipped at model.max_grad_norm; jumps mean unstable steps",
    "tokens_per_second": "speed: tokens learned from, all processes together",
    "generated_tokens": "tokens that the policy wrote so far to learn from",
    "scored_responses": "responses that a verifier or reward model scored so far to learn from",
    "rewards/chosen": "reward of the chosen response: of a loss with a reference its log-ratio to it, times beta; 0 at "
    "the start",
    "rewards/rejected": "the same of the rejected response",
    "rewards/margins": "reward of chosen minus that of rejected; above 0 the policy prefers chosen more than at the "
    "start",
    "rewards/accuracies": "share of pairs with the higher reward on chosen: 0.5 is chance, 1 all; where policy and "
    "reference are one, as at step 1, nothing is higher and it is 0",
    "rewards/desirable": "reward of the responses labeled good: beta times their log-ratio to the reference",
    "rewards/undesirable": "the same of those labeled bad; it shall end below the other",
    "rewards/spread": "spread of the student's scores of a prompt's responses",
    "logps/chosen": "log-probability of the chosen response under the policy, in nats; higher is likelier",
    "logps/rejected": "the same of the rejected response; that both fall is common with DPO",
    "nll": "mean −log probability of a response token, in nats; lower is likelier",
    "nll/chosen": "mean −log probability of a token of the chosen responses, in nats; ln of the vocabulary's size is "
    "guessing, lower is likelier",
    "kl/chosen": "KL(teacher‖student) a token of the chosen responses, in nats: how far the student is from the "
    "teacher there; 0 is equal, it shall fall",
    "kl/rejected": "the same on the rejected responses",
    "kl/teacher": "divergence on the teacher's responses, in nats a token; 0 is equal",
    "kl/student": "divergence on the student's responses, in nats a token; 0 is equal",
    "kl/target": "KL from the policy to the optimum of the objective, in nats a token; it shall fall",
    "kl/base": "KL from the policy to the base that it is held to, in nats a token; growth means drift",
    "kl": "KL from the policy to the model that training started from, in nats a token; growth means drift",
    "mass_in_support": "probability that the student gives to the teacher's stored top tokens: 1 is all of it; a fall "
    "means that it goes where the teacher says nothing",
    "coverage": "share of response tokens that stand in a span of text which both tokenizers have",
    "divergence/chosen": "divergence from the reference over the chosen response, in nats; growth means drift",
    "divergence/rejected": "the same over the rejected response",
    "advantage": "mean advantage of the policy's tokens, as the formula has it, in nats; the teacher likes higher",
    "entropy": "entropy of the policy's next token, in nats; a fall to 0 is a collapse",
    "teacher_entropy": "the same of the teacher",
    "response_tokens": "mean length of the responses learned from",
    "reward": "mean reward of the responses; higher is better",
    "weighted_reward": "the same, each response by its weight",
    "squared_weight": "mean square of the weights: 1 all alike, more: few responses have most of it",
    "weight": "mean weight of a token",
    "clipped": "share of tokens whose ratio lies outside the clip: they give no gradient",
    "agreement": "share of prompts for which student and teacher put the same response first",
    "extrapolation": "mean alpha: how far beyond the DPO model the target lies",
    "shaping": "mean of what the teacher's values add to a pair's margin",
    "reference_point": "KTO's z_0: rewards count from here",
}


def meaning(panel: str) -> str:
    """Return what a panel shows; empty for a metric that nobody described, such as one of a loss of your own."""
    if panel.startswith(TERM):
        return f"the part of loss that comes from {panel.removeprefix(TERM)}, with its weight"
    return MEANINGS.get(panel, "")


def glossary_section(panels: Iterable[str]) -> str:
    """Say how to read each of the panels; empty where none of them is described."""
    said = {panel: meaning(panel) for panel in sorted(set(panels)) if meaning(panel)}
    lines = "".join(f"<dt>{text(panel)}</dt><dd>{text(words)}</dd>" for panel, words in said.items())
    return section("glossary", "How to read the metrics", f'<dl class="words">{lines}</dl>') if lines else ""

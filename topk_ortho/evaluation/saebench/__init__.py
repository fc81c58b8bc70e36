"""SAEBench on a saved dictionary: python -m topk_ortho.evaluation.saebench SAE_DIR.

SAEBench [1] measures; this package loads the dictionary and its model, hands over text and words, and writes what comes
out as SAEBench's own JSON. Its `run_eval` functions load models and data by their names on the hub. What they call in
turn takes models and data that are there already, so it is these functions that are called here. What differs from
`run_eval`:

- words and text can be fewer or others, and a result says how many or which they were;
- a dictionary that was never trained is refused;
- beside the absorption of a letter stands how well a latent tells the letter, without which it says nothing.

[1] Karvonen et al., "SAEBench", arXiv:2503.09532.
"""

LATENT_STANDS_FOR = 0.5
"""F1 score of a letter's first latent from which the absorption of the letter means something"""


def result_name(dictionary: str) -> str:
    """Name of the file that SAEBench writes of a dictionary, in a folder of its evaluation."""
    return f"{dictionary}_custom_sae_eval_results.json"

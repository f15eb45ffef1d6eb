"""Tokenize conversations about images and videos (LLaVA or ShareGPT JSON) into the shards of a dataset.

Run it once, or as several workers (--worker i --num_workers n) that share the output folder; run it again
after any interruption: finished shards are kept. Conversations that cannot be used are listed, with their
file and line, in OUTPUT/quarantine.jsonl. See docs/post-training.md.
"""

from emu3_megatron.errors import run_main
from emu3_megatron.posttraining.conversation_job import ConversationConfig, tokenize_conversations
from emu3_megatron.settings import read_settings


def main() -> None:
    """Parse the command line and run one worker."""
    config = read_settings(ConversationConfig, __doc__)
    if tokenize_conversations(config):
        print(f"dataset complete: {config.output / 'manifest.json'}")
    else:
        print("this worker's shards are finished; other workers' are not")


if __name__ == "__main__":
    run_main(main)

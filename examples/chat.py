"""Hold a conversation with a model.

    python examples/chat.py                      # the bundled pair, which only knows Python code
    python examples/chat.py ./target ./draft     # your own pair; its chat template is used

Type a line and read the answer as it is generated; Ctrl-D ends the conversation.
"""

import sys

from easyspec_jax import Conversation, SamplingParams, open_model

# The bundled models are not chat models. This template shows each message as a line of code.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message.content }}\n{% endfor %}"


def main(target: str | None = None, draft: str | None = None) -> None:
    # Both None means the bundled pair. Weights are read when the first answer is generated.
    engine = open_model(target, draft)
    if target is None:
        engine.tokenizer.chat_template = PLAIN_TEMPLATE

    messages = [{"role": "system", "content": "# Answer briefly."}]
    for line in sys.stdin:
        messages.append({"role": "user", "content": line.strip()})

        # A Conversation is rendered with the chat template; a plain string would be continued as
        # it is. `tools=[...]` would offer functions to the model.
        prompt = Conversation(messages)

        # generate() takes a list of prompts and yields a Completion for each. `on_text` is called
        # with every piece of text as soon as it is certain.
        sampling = SamplingParams(temperature=0.8, seed=len(messages), max_new_tokens=48)
        for completion in engine.generate([prompt], sampling, on_text=show):
            messages.append({"role": "assistant", "content": completion.text})
            stats = completion.stats
            print(f"\n[{stats.mean_acceptance_length:.1f} tokens per pass of the target]")


def show(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Load a converted folder as anyone does, without sa_convert, and generate.

python docs/demo/generate.py FOLDER
"""

import sys

# As on a machine without sa_convert: importing it fails.
sys.modules["sa_convert"] = None  # type: ignore[assignment]

from transformers import AutoModelForCausalLM, AutoTokenizer, logging  # noqa: E402

logging.set_verbosity_error()
logging.disable_progress_bar()


def main(folder: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": "Name three rivers of Europe."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=60, do_sample=False)
    print(f"{type(model).__name__}, {model.num_parameters():,} parameters")
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    main(sys.argv[1])

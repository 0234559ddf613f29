"""The official OpenAI client for Python, unchanged, against a server: plain, streamed, errors, retries, abort.

python tools/clients/openai_client.py [http://127.0.0.1:8080]
"""

import base64
import json
import os
import pathlib
import struct
import sys
import threading
import time

import openai

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
PICTURES = pathlib.Path(__file__).resolve().parents[2] / "assets" / "pictures"
KEY = os.environ.get("BLIP2_API_KEY", "none")
client = openai.OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0)


def check(name, is_right, detail=""):
    print(("ok      " if is_right else "WRONG   ") + name, detail)
    if not is_right:
        sys.exit(1)


def data_url(name):
    return "data:image/jpeg;base64," + base64.b64encode((PICTURES / name).read_bytes()).decode()


def messages(question="What is this?", name="cat.jpg"):
    image = {"type": "image_url", "image_url": {"url": data_url(name)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def chat(**fields):
    return client.chat.completions.create(**{"model": model, "messages": messages(), "max_tokens": 12, **fields})


def fails(kind, code, **fields):
    try:
        chat(**fields)
    except kind as error:
        check(f"{kind.__name__} {code}", error.code == code and error.request_id, f"{error.code} {error.message}")
        return error
    check(f"{kind.__name__} {code}", False, "nothing was raised")


models = client.models.list().data
model = models[0].id
check("models.list", len(models) == 1 and client.models.retrieve(model).id == model, model)

plain = chat()
text = plain.choices[0].message.content
check("plain", isinstance(text, str) and plain.choices[0].finish_reason in ("stop", "length"), repr(text))
check("usage", plain.usage.total_tokens == plain.usage.prompt_tokens + plain.usage.completion_tokens)
check("the same again", chat().choices[0].message.content == text)
check("request id", plain._request_id)

pieces, usage, reason = [], None, None
for chunk in chat(stream=True, stream_options={"include_usage": True}):
    usage = chunk.usage or usage
    for choice in chunk.choices:
        pieces.append(choice.delta.content or "")
        reason = choice.finish_reason or reason
check("streamed", "".join(pieces) == text and reason == plain.choices[0].finish_reason, f"{len(pieces)} pieces")
check("streamed usage", usage.total_tokens == plain.usage.total_tokens)
check("remembered", usage.prompt_tokens_details.cached_tokens > 0, usage.prompt_tokens_details)
with client.chat.completions.stream(model=model, messages=messages(), max_tokens=12) as stream:
    final = stream.get_final_completion()
check("stream helper", final.choices[0].message.content == text)

several = chat(n=3, temperature=1.0, seed=5)
check("n and seed", several.choices == chat(n=3, temperature=1.0, seed=5).choices and len(several.choices) == 3)
probable = chat(logprobs=True, top_logprobs=3).choices[0].logprobs.content
check("logprobs", all(len(token.top_logprobs) == 3 and token.logprob <= 0 for token in probable), len(probable))
beams = chat(n=2, extra_body={"num_beams": 4})
check("beams", len(beams.choices) == 2, repr(beams.choices[0].message.content))
stop = chat(stop=[text[3:5]])
check("stop", stop.choices[0].message.content == text[: text.index(text[3:5])].rstrip())
schema = {
    "type": "object",
    "properties": {"animal": {"enum": ["cat", "dog", "none"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["animal", "count"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "animals", "schema": schema, "strict": True}}
answer = json.loads(chat(response_format=form, max_tokens=60).choices[0].message.content)
check("JSON of a schema", answer["animal"] in ["cat", "dog", "none"] and 0 <= answer["count"] <= 9, answer)
choice = chat(extra_body={"structured_outputs": {"choice": ["yes", "no"]}}).choices[0].message.content
check("one of two", choice in ["yes", "no"], choice)
turns = messages() + [{"role": "assistant", "content": text}, {"role": "user", "content": "Why?"}]
check("turns", isinstance(chat(messages=turns).choices[0].message.content, str))

fails(openai.NotFoundError, "model_not_found", model="gpt-4o")
fails(openai.BadRequestError, "invalid_value", max_tokens=-1)
fails(openai.BadRequestError, "invalid_value", messages=[{"role": "user", "content": "no picture"}])
fails(openai.BadRequestError, "unsupported_value", response_format={"type": "xml"})
fails(openai.BadRequestError, "invalid_constraint", extra_body={"guided_regex": "("})
remote = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x.png"}}]}]
fails(openai.BadRequestError, "invalid_image_url", messages=remote)
if KEY != "none":
    try:
        openai.OpenAI(base_url=f"{URL}/v1", api_key="wrong", max_retries=0).models.list()
        check("wrong key", False)
    except openai.AuthenticationError as error:
        check("wrong key", error.code == "invalid_api_key")

# A full queue: with retries every one of many is answered in the end.
patient = client.with_options(max_retries=30)
answers = []


def ask():
    answer = patient.chat.completions.create(model=model, messages=messages(), max_tokens=12)
    answers.append(answer.choices[0].message.content)


threads = [threading.Thread(target=ask) for _ in range(100)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
check("100 at once, with retries", answers == [text] * 100)

# Closing a stream ends the work.
stream = chat(stream=True, max_tokens=400, extra_body={"min_tokens": 400})
next(iter(stream))
stream.close()
time.sleep(1.0)
numbers = openai.DefaultHttpxClient().get(f"{URL}/metrics", headers={"authorization": f"Bearer {KEY}"}).text
check("abort", "blip2_running_texts 0" in numbers)

if "embeddings" in (models[0].model_extra or {}).get("capabilities", []):
    rows = client.embeddings.create(model=model, input=["a cat", "a dog"]).data
    as_floats = client.embeddings.create(model=model, input=["a cat", "a dog"], encoding_format="float").data
    same = all(
        struct.pack(f"<{len(a.embedding)}f", *a.embedding) == struct.pack(f"<{len(b.embedding)}f", *b.embedding)
        for a, b in zip(rows, as_floats)
    )
    check("embeddings, base64 and float", len(rows) == 2 and same, len(rows[0].embedding))
print("all as expected")

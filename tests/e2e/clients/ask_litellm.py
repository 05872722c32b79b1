"""litellm as it comes, against the server at argv[1] with the model argv[2]. Prints what it got as one JSON line."""

import json
import sys
from typing import Any

import litellm

base, model = sys.argv[1:]
server: dict[str, Any] = {"model": f"openai/{model}", "api_base": base, "api_key": "none", "temperature": 0}
question = [{"role": "user", "content": "What is the capital of France?"}]
weather = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
city = {
    "type": "object", "properties": {"city": {"type": "string"}, "country": {"enum": ["France", "Spain"]}},
    "required": ["city", "country"], "additionalProperties": False,
}  # fmt: skip
got: dict[str, Any] = {}

whole = litellm.completion(messages=question, max_tokens=24, **server)
got["whole"], got["usage"] = whole.choices[0].message.content, whole.usage.completion_tokens
chunks = list(
    litellm.completion(messages=question, max_tokens=24, stream=True, stream_options={"include_usage": True}, **server)
)
got["pieces"] = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
got["streamed_usage"] = chunks[-1].usage.completion_tokens

asked = [{"role": "user", "content": "What is the weather in Paris?"}]
called = litellm.completion(messages=asked, tools=[weather], tool_choice="required", max_tokens=64, **server)
call = called.choices[0].message.tool_calls[0]
got["call"] = [call.function.name, json.loads(call.function.arguments)]
told = [*asked, called.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "18 degrees, sunny"}]
got["told"] = litellm.completion(messages=told, tools=[weather], max_tokens=24, **server).choices[0].message.content

form = {"type": "json_schema", "json_schema": {"name": "city", "schema": city, "strict": True}}
shaped = litellm.completion(messages=question, response_format=form, max_tokens=64, **server)
got["shaped"] = json.loads(shaped.choices[0].message.content)

vectors = litellm.embedding(model=f"openai/{model}", api_base=base, api_key="none", input=["a lamp", "a sea"])
got["vectors"] = [len(row["embedding"]) for row in vectors.data]
try:
    litellm.completion(messages=question, **{**server, "temperature": 9})
except litellm.BadRequestError as error:
    got["refused"] = str(error)
print(json.dumps(got))

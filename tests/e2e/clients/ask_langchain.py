"""LangChain's OpenAI classes as they come, against the server at argv[1] with model argv[2]. Prints one JSON line."""

import json
import sys
from typing import Any, Literal

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai import BadRequestError
from pydantic import BaseModel

base, model = sys.argv[1:]
chat = ChatOpenAI(model=model, base_url=base, api_key="none", temperature=0, max_tokens=64, max_retries=0)
question = "What is the capital of France?"
got: dict[str, Any] = {}


@tool
def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"18 degrees and sunny in {city}"


class City(BaseModel):
    """A city."""

    city: str
    country: Literal["France", "Spain"]


whole = chat.invoke(question)
got["whole"], got["usage"] = whole.content, whole.usage_metadata["output_tokens"]
chunks = list(chat.stream(question, stream_usage=True))
got["pieces"] = [chunk.content for chunk in chunks if chunk.content]
got["streamed_usage"] = sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata)

asked = HumanMessage("What is the weather in Paris?")
called = chat.bind_tools([get_weather], tool_choice="any").invoke([asked])
call = called.tool_calls[0]
got["call"] = [call["name"], call["args"]]
answer = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
got["told"] = chat.bind_tools([get_weather]).invoke([asked, called, answer]).content

got["shaped"] = chat.with_structured_output(City).invoke(question).model_dump()
got["by_call"] = chat.with_structured_output(City, method="function_calling").invoke(question).model_dump()

# LangChain cuts texts with OpenAI's own tokenizer unless it is told that the server counts for itself.
texts = OpenAIEmbeddings(model=model, base_url=base, api_key="none", check_embedding_ctx_length=False)
got["vectors"] = [len(vector) for vector in texts.embed_documents(["a lamp", "a sea"])]
try:
    chat.bind(temperature=9).invoke(question)
except BadRequestError as error:
    got["refused"] = str(error)
print(json.dumps(got))

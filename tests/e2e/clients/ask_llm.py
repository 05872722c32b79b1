"""The `llm` command as it comes, against the server at argv[1] with the model argv[2]. Prints one JSON line.

LLM_USER_PATH names an empty folder: all that the command is told of the server stands in its extra-openai-models.yaml.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

base, model = sys.argv[1:]
known = {
    "model_id": "node", "model_name": model, "api_base": base, "api_key_name": "node",
    "supports_schema": True, "supports_tools": True,
}  # fmt: skip
settings = Path(os.environ["LLM_USER_PATH"])
settings.joinpath("extra-openai-models.yaml").write_text(json.dumps([known]))  # JSON is YAML
settings.joinpath("keys.json").write_text('{"node": "none"}')
question = "What is the capital of France?"
weather = 'def get_weather(city: str) -> str:\n    "The weather of a city."\n    return f"18 degrees in {city}"\n'
call = 'Repeat this: <tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("llm"), "-m", "node", "-o", "temperature", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"llm {arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


got = {"streamed": ask(question).stdout.strip(), "whole": ask("--no-stream", question).stdout.strip()}
got["shaped"] = json.loads(ask("--schema", "city, year int", question).stdout)
# The command cannot force a call, so the model is told what to say; --td shows on stderr what was called.
got["called"] = ask("--functions", weather, "--td", call).stderr
print(json.dumps(got))

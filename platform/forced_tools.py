"""`tool_choice` required or by name, as a grammar of the whole answer: JSON that is the calls."""

from __future__ import annotations

from typing import Any

from loraplex.platform.chat_schemas import ChatBody, NamedTool, Tool
from loraplex.platform.structured import Structured, json_schema

_PARAM = "tools"


def forced_tools(body: ChatBody) -> Structured | None:
    """None: the model may choose. Raises: ApiError(invalid_grammar) about `tools`."""
    choice, tools = body.tool_choice, body.tools or []
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
    elif choice != "required":
        return None
    definitions: dict[str, Any] = {}
    calls = [_call(i, tool, definitions) for i, tool in enumerate(tools)]
    call = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if isinstance(choice, NamedTool) or body.parallel_tool_calls is False:
        schema = call
    else:
        schema = {"type": "array", "items": call, "minItems": 1}
    if definitions:
        schema = {**schema, "$defs": definitions}
    return Structured(json_schema(schema, _PARAM), _PARAM)


def _call(index: int, tool: Tool, definitions: dict[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = tool.function.parameters or {"type": "object"}
    if _has_reference(parameters):
        # A reference counts from the root of its schema, which is here now.
        place = f"tool{index}"
        definitions[place] = _moved(parameters, f"#/$defs/{place}")
        parameters = {"$ref": f"#/$defs/{place}"}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _has_reference(schema: Any) -> bool:
    if isinstance(schema, dict):
        return isinstance(schema.get("$ref"), str) or any(map(_has_reference, schema.values()))
    return isinstance(schema, list) and any(map(_has_reference, schema))


def _moved(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_moved(item, root) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, root) for key, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = root + reference[1:]
    return moved

from typing import Any


async def test_boot_upload_list_complete(server: Any) -> None:
    assert (await server.http.get("/healthz")).status_code == 200
    assert (await server.http.get("/readyz")).status_code == 200
    made = await server.upload("sql")
    print(made)
    listed = (await server.http.get("/v1/adapters")).json()
    assert [a["id"] for a in listed["data"]] == ["sql"]
    answer = await server.http.post(
        "/v1/completions", json={"adapter_id": "sql", "prompt": "x", "max_tokens": 5}
    )
    print(answer.json())
    assert answer.json()["choices"][0]["text"] == "abcde"
    answer = await server.http.post(
        "/v1/completions",
        json={
            "adapter_id": "sql",
            "prompt": "x",
            "max_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    )
    print(answer.text)
    answer = await server.http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "stream": True},
    )
    print(answer.text)
    for path in (
        "/metrics",
        "/v1/models",
        "/v1/admin/slots",
        "/v1/admin/adapters",
        "/v1/admin/memory",
        "/v1/admin/requests",
        "/v1/admin/events",
        "/openapi.json",
    ):
        answer = await server.http.get(path)
        assert answer.status_code == 200, (path, answer.text)
    print((await server.http.delete("/v1/adapters/sql")).json())

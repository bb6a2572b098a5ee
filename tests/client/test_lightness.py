"""The client runs where nothing but its own dependencies is installed."""

from __future__ import annotations

import subprocess
import sys

from tests.scripted import Running

_BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Block())
"""


def test_without_torch_and_server(server: Running) -> None:
    blocked = ["torch", "transformers", "numpy", "pydantic", "msgspec", "tokenizers", "server", "attention"]
    code = _BLOCK.format(blocked=blocked) + (
        "import asyncio\n"
        "from longspan import AsyncClient, Client\n"
        f"print(Client(port={server.port}).generate('abc').text)\n"
        "async def main():\n"
        f"    async with AsyncClient(port={server.port}) as client:\n"
        "        print((await client.generate('def')).text)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "cba\nfed\n"

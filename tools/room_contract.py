"""Import-linter contracts that read the tables of pyproject.toml: rooms (docs/design.md) and outside packages.

In: `table`, one line each, "name: room, room, ...". Out: every direct import inside the package that the table does
not allow. A room that exists but has no line is an error; a line for a room that is not built yet is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, fields, output


def parse_table(lines: Iterable[object]) -> dict[str, set[str]]:
    """'a: b, c' -> {'a': {'b', 'c'}}."""
    split = (str(line).partition(":") for line in lines)
    return {name.strip(): {word.strip() for word in words.split(",") if word.strip()} for name, _, words in split}


def direct_imports(graph: ImportGraph, package: str) -> Iterator[tuple[str, str, str, int]]:
    """(room, importer, imported, line) of every import made by a module of the package."""
    prefix = f"{package}."
    for importer in sorted(module for module in graph.modules if module.startswith(prefix)):
        room = importer.removeprefix(prefix).split(".")[0]
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            details = graph.get_import_details(importer=importer, imported=imported)
            yield room, importer, imported, details[0]["line_number"]


class RoomsContract(Contract):
    """table: "room: the rooms it may import". `everyone_may` are modules that all rooms may import."""

    package = fields.StringField()
    table = fields.ListField(subfield=fields.StringField())
    everyone_may = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        allowed, everyone_may = parse_table(self.table), set(map(str, self.everyone_may))
        prefix = f"{self.package}."
        present = {module.removeprefix(prefix).split(".")[0] for module in graph.modules if module.startswith(prefix)}
        unlisted = sorted(present - allowed.keys())
        broken = []
        for room, importer, imported, line in direct_imports(graph, str(self.package)):
            target = imported.removeprefix(prefix).split(".")[0] if imported.startswith(prefix) else None
            if target is not None and target not in allowed.get(room, set()) | everyone_may | {room}:
                broken.append((importer, imported, line))
        return ContractCheck(kept=not broken and not unlisted, metadata={"broken": broken, "unlisted": unlisted})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for room in check.metadata["unlisted"]:
            output.print_error(f"room '{room}' has no line in the table of pyproject.toml ([tool.importlinter])")
        for importer, imported, line in check.metadata["broken"]:
            output.print_error(f"{importer}:{line} imports {imported}, which its room may not")


class ExternalsContract(Contract):
    """table: "outside package: the rooms that may import it". Packages without a line are free for all."""

    package = fields.StringField()
    table = fields.ListField(subfield=fields.StringField())

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        allowed = parse_table(self.table)
        broken = [
            (importer, imported, line)
            for room, importer, imported, line in direct_imports(graph, str(self.package))
            if imported in allowed and room not in allowed[imported]
        ]
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for importer, imported, line in check.metadata["broken"]:
            output.print_error(f"{importer}:{line} imports {imported}, which its room may not")

"""A software bill of materials: what an export was made with, as CycloneDX 1.6 in JSON.

The library cyclonedx-python-lib, the extra `sbom`, makes the document; it is imported when one is made. The same
packages and the same time give the same bytes.
"""

import datetime
import importlib.util
import platform
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from cnx_deploy.documents import MAX_DOCUMENT_BYTES
from cnx_deploy.errors import InputError, MissingRequirementError, OutputExistsError
from cnx_deploy.installed import Installation, InstalledPackage

if TYPE_CHECKING:
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import License

__all__ = ["bill_of_materials", "check_sbom"]

MARK = b'"bomFormat": "CycloneDX"'
NAMESPACE = uuid.UUID("6f0a4d0e-6d0f-4c53-9a6c-0f6a3c3a7d0b")
"""Of serial numbers that are derived from what a document says."""


def check_sbom(path: Path | None, *, force: bool) -> None:
    """Raise, before anything is looked at, what would keep a document from being made or written at `path`.

    MissingRequirementError without the library, InputError for a folder, device or pipe, OutputExistsError where
    something else than a bill of materials is and `force` is not set.
    """
    if importlib.util.find_spec("cyclonedx") is None:
        raise MissingRequirementError(
            "cyclonedx-python-lib is not installed, which makes the document. Install it with "
            "pip install 'cnx-deploy[sbom]'."
        )
    if path is None or not path.exists():
        return
    if not path.is_file():
        raise InputError(f"{path} is no file, where one was expected. Give a file name, such as sbom.json.")
    if not force and not _is_one(path):
        raise OutputExistsError(
            f"{path} exists and is no bill of materials. Use --force to replace it, or another name."
        )


def _is_one(path: Path) -> bool:
    """Whether a file is a bill of materials: by its mark, in no more of it than such a document has."""
    with path.open("rb") as stream:
        return MARK in stream.read(MAX_DOCUMENT_BYTES)


def bill_of_materials(installation: Installation, created: datetime.datetime | None = None) -> str:
    """The document. `created` is the time that it bears (default: now); the serial number depends on it too."""
    from cyclonedx.model import Property
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    created = created or datetime.datetime.now(datetime.UTC)
    root = _component(installation.root, ComponentType.APPLICATION)
    components = {each.name: _component(each, ComponentType.LIBRARY) for each in installation.packages}
    tool = _component(installation.root, ComponentType.APPLICATION, prefix="tool:")
    machine = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}"}
    about = BomMetaData(
        component=root,
        tools=ToolRepository(components=[tool]),
        timestamp=created,
        properties=[Property(name=f"cnx-deploy:{name}", value=value) for name, value in machine.items()],
    )
    serial = uuid.uuid5(NAMESPACE, f"{installation} {machine} {created.isoformat()}")
    bom = Bom(metadata=about, components=components.values(), serial_number=serial)
    bom.register_dependency(root, [components[name] for name in installation.root.needs])
    for package in installation.packages:
        bom.register_dependency(components[package.name], [components[name] for name in package.needs])
    return str(JsonV1Dot6(bom).output_as_string(indent=2)) + "\n"


def _component(package: InstalledPackage, kind: "ComponentType", prefix: str = "") -> "Component":
    from cyclonedx.model.component import Component, ComponentScope
    from packageurl import PackageURL

    return Component(
        name=package.name,
        version=package.version,
        type=kind,
        scope=ComponentScope.OPTIONAL if package.is_optional else ComponentScope.REQUIRED,
        purl=PackageURL("pypi", name=package.name, version=package.version),
        bom_ref=f"{prefix}{package.name}=={package.version}",
        licenses=[_licence(text) for text in package.licences],
    )


def _licence(text: str) -> "License":
    """By its SPDX identifier or expression where it is one, else by the name that it has in the metadata."""
    from cyclonedx.model.license import DisjunctiveLicense, LicenseAcknowledgement, LicenseExpression
    from cyclonedx.spdx import fixup_id, is_expression

    declared = LicenseAcknowledgement.DECLARED
    if (identifier := fixup_id(text)) is not None:
        return DisjunctiveLicense(id=identifier, acknowledgement=declared)
    if is_expression(text):
        return LicenseExpression(text, acknowledgement=declared)
    return DisjunctiveLicense(name=text, acknowledgement=declared)

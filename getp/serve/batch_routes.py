"""The routes of files and batches."""

import re
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

from anyio import to_thread
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from getp.serve.batches import Batches
from getp.serve.errors import ApiError, not_found
from getp.serve.http import json_body

_PURPOSES = ("batch",)
_MAX_LISTED = 10_000


class BatchRoutes:
    """The endpoints; without batches each says how to get them."""

    def __init__(self, batches: Batches | None) -> None:
        self._given = batches

    def routes(self) -> list[Route]:
        """Return the routes."""
        file, batch = "/v1/files/{file_id}", "/v1/batches/{batch_id}"
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files", self._list_files),
            Route(file, self._file),
            Route(file, self._delete_file, methods=["DELETE"]),
            Route(f"{file}/content", self._content),
            Route("/v1/batches", self._create, methods=["POST"]),
            Route("/v1/batches", self._list_batches),
            Route(batch, self._batch),
            Route(f"{batch}/cancel", self._cancel, methods=["POST"]),
        ]

    @property
    def _batches(self) -> Batches:
        if self._given is None:
            raise ApiError(
                501, "this server was started without a folder for batches", "no_data_folder"
            )
        if self._given.closed:
            raise ApiError(503, "the server is stopping", "stopping")
        return self._given

    async def _upload(self, request: Request) -> Response:
        files = self._batches.files
        async with request.form(max_files=1, max_fields=16) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(
                    400, "'file' is missing: upload it as multipart/form-data", None, "file"
                )
            if purpose not in _PURPOSES:
                raise ApiError(400, "'purpose' must be 'batch'", "invalid_value", "purpose")
            name = (file.filename or "input.jsonl")[:255]
            write = partial(shutil.copyfileobj, file.file)
            stored = await to_thread.run_sync(files.add, name, "batch", write)
        return JSONResponse(stored.as_json())

    async def _list_files(self, request: Request) -> Response:
        purpose = request.query_params.get("purpose")
        found = [
            each.as_json()
            for each in self._batches.files.all()
            if purpose is None or each.purpose == purpose
        ]
        return JSONResponse(_page(request, found, _MAX_LISTED))

    async def _file(self, request: Request) -> Response:
        return JSONResponse(self._batches.files.get(request.path_params["file_id"]).as_json())

    async def _delete_file(self, request: Request) -> Response:
        file_id = request.path_params["file_id"]
        if self._batches.uses(file_id):
            raise ApiError(409, "an unfinished batch needs this file", "in_use")
        self._batches.files.delete(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def _content(self, request: Request) -> Response:
        files = self._batches.files
        found = files.get(request.path_params["file_id"])
        return FileResponse(files.path(found.id), media_type="application/octet-stream")

    async def _create(self, request: Request) -> Response:
        body = await json_body(request)
        return JSONResponse(await to_thread.run_sync(self._batches.create, body))

    async def _list_batches(self, request: Request) -> Response:
        found = [batch.as_json() for batch in self._batches.all()]
        return JSONResponse(_page(request, found, 100))

    async def _batch(self, request: Request) -> Response:
        return JSONResponse(self._batches.get(request.path_params["batch_id"]).as_json())

    async def _cancel(self, request: Request) -> Response:
        batch_id = request.path_params["batch_id"]
        return JSONResponse(await to_thread.run_sync(self._batches.cancel, batch_id))


def _page(request: Request, found: Sequence[dict[str, Any]], longest: int) -> dict[str, Any]:
    """Return the part of a list that a client asks for. Raises ApiError."""
    given, after = request.query_params.get("limit"), request.query_params.get("after")
    if given is not None and not (re.fullmatch("[0-9]{1,5}", given) and 1 <= int(given) <= longest):
        raise ApiError(400, f"'limit' must be from 1 to {longest}", "invalid_value", "limit")
    limit = min(20, longest) if given is None and longest <= 100 else int(given or longest)
    if after is not None:
        ids = [each["id"] for each in found]
        if after not in ids:
            raise not_found("object", after)
        found = found[ids.index(after) + 1 :]
    data = found[:limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": len(found) > limit,
    }

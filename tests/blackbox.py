#!/usr/bin/env python3
"""Tests a running service with a Python client that uses gRPC reflection only, without generated code.

    python3 tests/blackbox.py ADDRESS TOKEN_FILE

Requires the packages grpcio and grpcio-reflection, and the token of a member or administrator. Creates issues, labels and
imports under unique names, so it can run repeatedly on the same database. Exits with code 1 at the first step that fails.
"""

import sys
import time
import uuid

import grpc
from google.protobuf import descriptor_pool, message_factory
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

PACKAGE = "issuetracker.v1"
DEADLINE_SECONDS = 30


class Tracker:
    """Calls methods by name, with fields as keyword arguments."""

    def __init__(self, address, token):
        self.channel = grpc.insecure_channel(address)
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = descriptor_pool.DescriptorPool(self.database)
        self.metadata = [("authorization", f"Bearer {token}")]

    def message(self, name, **fields):
        """Returns a message, given its full name or its name in the package of the service."""
        name = name if "." in name else f"{PACKAGE}.{name}"
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))(**fields)

    def number(self, enum, name):
        return self.pool.FindEnumTypeByName(f"{PACKAGE}.{enum}").values_by_name[name].number

    def method(self, service, name):
        return self.pool.FindServiceByName(f"{PACKAGE}.{service}").methods_by_name[name]

    def call(self, service, method, metadata=None, timeout=DEADLINE_SECONDS, **fields):
        described = self.method(service, method)
        request = message_factory.GetMessageClass(described.input_type)(**fields)
        stub = self.channel.unary_unary(
            f"/{PACKAGE}.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        return stub(request, metadata=self.metadata if metadata is None else metadata, timeout=timeout)

    def fails(self, code, reason, service, method, **fields):
        """Makes a call that must fail with this code and reason. Returns the error details by type name."""
        try:
            response = self.call(service, method, **fields)
        except grpc.RpcError as error:
            details = self.details(error)
            assert error.code() == code, f"{error.code()}, not {code}: {error.details()}"
            info = details["google.rpc.ErrorInfo"]
            assert (info.domain, info.reason) == ("issuetracker", reason), info
            return details
        raise AssertionError(f"{method} must fail, but returned {response}")

    def details(self, error):
        packed = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
        # Reflection also serves google.rpc.Status and the types of the details.
        status = self.message("google.rpc.Status")
        status.ParseFromString(packed)
        details = {}
        for any_message in status.details:
            name = any_message.type_url.rsplit("/", 1)[1]
            details[name] = self.message(name)
            details[name].ParseFromString(any_message.value)
        return details

    def import_csv(self, file, chunk_bytes=10_000, **options):
        """Imports a file. Returns its row errors and its summary."""
        described = self.method("ImportService", "ImportIssues")
        request = message_factory.GetMessageClass(described.input_type)

        def requests():
            yield request(options=self.message("ImportOptions", total_bytes=len(file), **options))
            for offset in range(0, len(file), chunk_bytes):
                data = file[offset : offset + chunk_bytes]
                yield request(chunk=self.message("ImportChunk", offset=offset, data=data))

        stub = self.channel.stream_stream(
            f"/{PACKAGE}.ImportService/ImportIssues",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        responses = list(stub(requests(), metadata=self.metadata, timeout=DEADLINE_SECONDS))
        errors = [response.row_error for response in responses if response.WhichOneof("message") == "row_error"]
        summaries = [response.summary for response in responses if response.WhichOneof("message") == "summary"]
        assert len(summaries) == 1 and responses[-1].WhichOneof("message") == "summary", responses[-1]
        return errors, summaries[0]


class Run:
    """The test steps, in order. A step uses what earlier steps have created."""

    def __init__(self, tracker):
        self.tracker = tracker
        self.call = tracker.call
        self.fails = tracker.fails
        self.mark = f"run{uuid.uuid4().hex[:12]}"

    def services_are_described(self):
        names = set(self.tracker.database.get_services())
        nouns = ["Auth", "User", "Issue", "Comment", "Label", "Import", "Report"]
        missing = {f"{PACKAGE}.{noun}Service" for noun in nouns} | {"grpc.health.v1.Health"}
        assert missing <= names, missing - names

    def health_check_needs_no_token(self):
        request = self.tracker.message("grpc.health.v1.HealthCheckRequest")
        response = type(self.tracker.message("grpc.health.v1.HealthCheckResponse"))
        stub = self.tracker.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=response.FromString,
        )
        assert stub(request, timeout=DEADLINE_SECONDS).status == 1

    def calls_without_a_token_are_unauthenticated(self):
        self.fails(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "IssueService", "ListIssues", metadata=[])

    def who_am_i_returns_the_user_of_the_token(self):
        self.user = self.call("AuthService", "WhoAmI")
        assert self.user.username and self.user.id, self.user

    def create_issue_returns_the_issue(self):
        self.request_id = str(uuid.uuid4())
        self.create_request = {
            "issue": {"title": f"crash on start {self.mark}", "description": "why?", "priority": 3},
            "request_id": self.request_id,
        }
        self.issue = self.call("IssueService", "CreateIssue", **self.create_request)
        assert (self.issue.version, self.issue.status, self.issue.priority) == (1, 1, 3), self.issue
        assert self.issue.reporter_id == self.user.id

    def retry_with_the_same_request_id_returns_the_same_issue(self):
        assert self.call("IssueService", "CreateIssue", **self.create_request) == self.issue
        other = {**self.create_request, "issue": {"title": "another"}}
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", "IssueService", "CreateIssue", **other)

    def all_invalid_fields_of_an_issue_are_reported(self):
        details = self.fails(
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID", "IssueService", "CreateIssue", issue={"priority": 99}
        )
        fields = {violation.field for violation in details["google.rpc.BadRequest"].field_violations}
        assert fields == {"issue.title", "issue.priority"}, fields

    def comment_and_reply_are_created(self):
        comment = {"issue_id": self.issue.id, "content": "it does"}
        self.comment = self.call("CommentService", "CreateComment", comment=comment)
        reply = {"issue_id": self.issue.id, "content": "since when?", "parent_id": self.comment.id}
        self.reply = self.call("CommentService", "CreateComment", comment=reply)
        assert self.reply.parent_id == self.comment.id

    def full_view_includes_comments(self):
        basic = self.call("IssueService", "GetIssue", id=self.issue.id)
        assert (basic.comment_count, len(basic.comments)) == (2, 0), basic
        view = self.tracker.number("IssueView", "ISSUE_VIEW_FULL")
        full = self.call("IssueService", "GetIssue", id=self.issue.id, view=view)
        assert [comment.content for comment in full.comments] == ["it does", "since when?"], full

    def not_found_names_the_issue(self):
        missing = str(uuid.uuid4())
        details = self.fails(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "IssueService", "GetIssue", id=missing)
        assert details["google.rpc.ResourceInfo"].resource_name == missing

    def update_changes_only_masked_fields(self):
        changed = {"id": self.issue.id, "title": f"crash on stop {self.mark}", "description": "left out"}
        mask = self.tracker.message("google.protobuf.FieldMask", paths=["title", "priority"])
        updated = self.call("IssueService", "UpdateIssue", issue=changed, update_mask=mask, expected_version=1)
        assert (updated.title, updated.description, updated.priority) == (changed["title"], "why?", 0), updated
        assert updated.version == 2

    def stale_version_is_aborted(self):
        issue = {"id": self.issue.id, "title": "too late"}
        details = self.fails(
            grpc.StatusCode.ABORTED, "VERSION_MISMATCH", "IssueService", "UpdateIssue", issue=issue, expected_version=1
        )
        assert details["google.rpc.ErrorInfo"].metadata["current_version"] == "2"

    def labels_are_added_and_removed(self):
        names = [f"{self.mark}-a", f"{self.mark}-b"]
        labels = [self.call("LabelService", "CreateLabel", label={"name": name}) for name in names]
        ids = [label.id for label in labels]
        self.call("LabelService", "AddIssueLabels", issue_id=self.issue.id, label_ids=ids)
        self.call("LabelService", "RemoveIssueLabels", issue_id=self.issue.id, label_ids=ids[1:])
        issue = self.call("IssueService", "GetIssue", id=self.issue.id)
        assert [label.name for label in issue.labels] == names[:1], issue
        assert issue.version == 4, issue.version
        taken = {"name": names[0].upper()}
        self.fails(grpc.StatusCode.ALREADY_EXISTS, "ALREADY_EXISTS", "LabelService", "CreateLabel", label=taken)

    def list_is_filtered_and_paginated(self):
        issues = [{"title": f"part {n} {self.mark}"} for n in range(5)]
        batch = self.call("IssueService", "BatchCreateIssues", issues=issues)
        self.batch = [issue.id for issue in batch.issues]
        assert [issue.title for issue in batch.issues] == [issue["title"] for issue in issues]
        listed, token, pages = [], "", 0
        while pages == 0 or token:
            query = {"filter": f'status = OPEN "{self.mark}"', "page_size": 4, "page_token": token}
            page = self.call("IssueService", "ListIssues", **query)
            listed += [issue.id for issue in page.issues]
            token, pages = page.next_page_token, pages + 1
        assert (pages, listed) == (2, [*reversed(self.batch), self.issue.id]), (pages, listed)
        of_label = self.call("IssueService", "ListIssues", filter=f"label = {self.mark}-a")
        assert [issue.id for issue in of_label.issues] == [self.issue.id]
        details = self.fails(
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID", "IssueService", "ListIssues", filter="status = DONE"
        )
        assert details["google.rpc.BadRequest"].field_violations[0].field == "filter"

    def bulk_update_is_atomic(self):
        closed = self.tracker.number("Status", "STATUS_CLOSED")
        missing = [*self.batch, str(uuid.uuid4())]
        details = self.fails(
            grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "IssueService", "BulkUpdateStatus", ids=missing, status=closed
        )
        assert details["google.rpc.BadRequest"].field_violations[0].field == "ids[5]"
        updated = self.call("IssueService", "BulkUpdateStatus", ids=self.batch, status=closed, comment="done")
        assert updated.changed_count == 5 and [result.version for result in updated.results] == [2] * 5, updated
        again = self.call("IssueService", "BulkUpdateStatus", ids=self.batch, status=closed)
        assert again.changed_count == 0 and [result.version for result in again.results] == [2] * 5, again

    def csv(self, rows):
        lines = ["title,description,priority,status,external_id"]
        lines += [f'"row {n}, {self.mark}",line one,high,open,{self.mark}-{n}' for n in range(1, rows + 1)]
        return lines

    def import_with_skip_invalid_skips_invalid_rows(self):
        lines = self.csv(1_000)
        lines[10] = "too,short"
        lines[500] = lines[500].replace("high", "hihg")
        lines[1_000] = lines[1]
        file = "\r\n".join(lines).encode()
        mode = self.tracker.number("ImportMode", "IMPORT_MODE_SKIP_INVALID")
        self.imported = {"file": file, "mode": mode, "import_id": str(uuid.uuid4())}
        errors, self.summary = self.tracker.import_csv(**self.imported)
        codes = [(error.row_number, error.code) for error in errors]
        expected = [(10, "WRONG_FIELD_COUNT"), (500, "INVALID_PRIORITY"), (1_000, "DUPLICATE_EXTERNAL_ID")]
        assert codes == expected, codes
        assert all(file[error.byte_offset :].startswith(lines[error.row_number].encode()) for error in errors)
        assert (self.summary.row_count, self.summary.created_count, self.summary.rejected_count) == (1_000, 997, 3)
        assert self.summary.state == self.tracker.number("ImportState", "IMPORT_STATE_COMMITTED")
        found = self.call("IssueService", "ListIssues", filter=f'"row 999, {self.mark}"').issues
        assert len(found) == 1 and found[0].version == 1 and found[0].external_id == f"{self.mark}-999", found

    def finished_import_sent_again_returns_its_summary(self):
        errors, summary = self.tracker.import_csv(**self.imported)
        assert (errors, summary) == ([], self.summary), summary

    def atomic_import_with_an_invalid_row_is_rejected(self):
        lines = [line.replace(self.mark, f"{self.mark}-atomic") for line in self.csv(10)]
        lines[5] += ",one too many"
        errors, summary = self.tracker.import_csv("\n".join(lines).encode(), chunk_bytes=7)
        assert [(error.row_number, error.line_number) for error in errors] == [(5, 6)], errors
        assert summary.state == self.tracker.number("ImportState", "IMPORT_STATE_REJECTED"), summary
        assert (summary.created_count, summary.rejected_count) == (0, 1), summary
        assert not self.call("IssueService", "ListIssues", filter=f'"{self.mark}-atomic"').issues

    def cancelled_import_writes_nothing(self):
        stub = self.tracker.channel.stream_stream(
            f"/{PACKAGE}.ImportService/ImportIssues", request_serializer=lambda message: message.SerializeToString()
        )
        request = message_factory.GetMessageClass(self.tracker.method("ImportService", "ImportIssues").input_type)
        mode = self.tracker.number("ImportMode", "IMPORT_MODE_SKIP_INVALID")
        options = {"mode": mode, "import_id": str(uuid.uuid4())}

        def requests():
            yield request(options=self.tracker.message("ImportOptions", **options))
            data = f"title\nwhole cancelled-{self.mark}\nhalf cancelled-{self.mark}".encode()
            yield request(chunk=self.tracker.message("ImportChunk", data=data))
            time.sleep(DEADLINE_SECONDS)

        call = stub(requests(), metadata=self.tracker.metadata)
        next(call)
        call.cancel()
        # If the cancelled import had committed anything, this retry would report its rows.
        _, summary = self.retry_while_running(lambda: self.tracker.import_csv(b"title\n", **options))
        assert (summary.row_count, summary.byte_count) == (0, 6), summary
        assert not self.call("IssueService", "ListIssues", filter=f'"cancelled-{self.mark}"').issues

    def retry_while_running(self, attempt):
        for _ in range(300):
            try:
                return attempt()
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.ABORTED:
                    raise
                time.sleep(0.1)
        raise AssertionError("the cancelled import still runs")

    def reports_include_the_changes(self):
        issue = {"id": self.issue.id, "assignee_id": self.user.id}
        self.call("IssueService", "UpdateIssue", issue=issue)
        scope = self.tracker.number("IssueScope", "ISSUE_SCOPE_ALL")
        top = self.call("ReportService", "GetTopAssignees", scope=scope, limit=100).assignees
        counts = [row.issue_count for row in top]
        assert counts == sorted(counts, reverse=True), counts
        assert [row for row in top if row.user.id == self.user.id and row.open_count > 0], top
        latency = self.call("ReportService", "GetResolutionLatency").groups
        assert len(latency) == 1 and latency[0].count >= len(self.batch), latency


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__.strip())
    with open(sys.argv[2], encoding="ascii") as file:
        tracker = Tracker(sys.argv[1], file.read().strip())
    run = Run(tracker)
    helpers = {"csv", "retry_while_running"}
    steps = [name for name in vars(Run) if not name.startswith("_") and name not in helpers]
    for passed, name in enumerate(steps):
        try:
            getattr(run, name)()
        except (AssertionError, grpc.RpcError) as error:
            print(f"FAILED {name.replace('_', ' ')}: {error}")
            print(f"{passed} passed, 1 failed")
            sys.exit(1)
        print(f"ok     {name.replace('_', ' ')}")
    print(f"{len(steps)} passed, 0 failed")


if __name__ == "__main__":
    main()

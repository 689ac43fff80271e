#!/usr/bin/env python3
"""Drives a running service as a stranger would: by reflection alone, without generated code.

    python3 tests/blackbox.py ADDRESS TOKEN_FILE

Needs the packages grpcio and grpcio-reflection, and a token of a member or administrator. Makes issues, labels and
imports under names of its own, so that it can be run again on the same database. Ends with exit code 1 at the first
step that fails.
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
        """A message by its full name, or by its name in the service's package."""
        name = name if "." in name else f"{PACKAGE}.{name}"
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))(**fields)

    def number(self, enum, name):
        return self.pool.FindEnumTypeByName(f"{PACKAGE}.{enum}").values_by_name[name].number

    def method(self, service, name):
        return self.pool.FindServiceByName(f"{PACKAGE}.{service}").methods_by_name[name]

    def call(self, service, method, metadata=None, **fields):
        described = self.method(service, method)
        request = message_factory.GetMessageClass(described.input_type)(**fields)
        stub = self.channel.unary_unary(
            f"/{PACKAGE}.{service}/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(described.output_type).FromString,
        )
        return stub(request, metadata=self.metadata if metadata is None else metadata, timeout=DEADLINE_SECONDS)

    def fails(self, code, reason, service, method, **fields):
        """The error's details by the names of their types, for a call that must fail like this."""
        try:
            answer = self.call(service, method, **fields)
        except grpc.RpcError as error:
            details = self.details(error)
            assert error.code() == code, f"{error.code()}, not {code}: {error.details()}"
            info = details["google.rpc.ErrorInfo"]
            assert (info.domain, info.reason) == ("issuetracker", reason), info
            return details
        raise AssertionError(f"{method} must fail, and answered {answer}")

    def details(self, error):
        packed = dict(error.trailing_metadata()).get("grpc-status-details-bin", b"")
        # Reflection describes it and the types of its details too.
        status = self.message("google.rpc.Status")
        status.ParseFromString(packed)
        details = {}
        for any_message in status.details:
            name = any_message.type_url.rsplit("/", 1)[1]
            details[name] = self.message(name)
            details[name].ParseFromString(any_message.value)
        return details

    def import_csv(self, file, chunk_bytes=10_000, **options):
        """The messages that an import of the file is answered with."""
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
        answers = list(stub(requests(), metadata=self.metadata, timeout=DEADLINE_SECONDS))
        errors = [answer.row_error for answer in answers if answer.WhichOneof("message") == "row_error"]
        summaries = [answer.summary for answer in answers if answer.WhichOneof("message") == "summary"]
        assert len(summaries) == 1 and answers[-1].WhichOneof("message") == "summary", answers[-1]
        return errors, summaries[0]


class Run:
    """The steps, in order; each goes on from what those before it have made."""

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

    def health_is_serving_without_a_token(self):
        request = self.tracker.message("grpc.health.v1.HealthCheckRequest")
        answer = type(self.tracker.message("grpc.health.v1.HealthCheckResponse"))
        stub = self.tracker.channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=answer.FromString,
        )
        assert stub(request, timeout=DEADLINE_SECONDS).status == 1

    def calls_without_a_token_are_unauthenticated(self):
        self.fails(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", "IssueService", "ListIssues", metadata=[])

    def the_token_is_somebodys(self):
        self.user = self.call("AuthService", "WhoAmI")
        assert self.user.username and self.user.id, self.user

    def an_issue_is_filed(self):
        self.request_id = str(uuid.uuid4())
        self.filing = {
            "issue": {"title": f"crash on start {self.mark}", "description": "why?", "priority": 3},
            "request_id": self.request_id,
        }
        self.issue = self.call("IssueService", "CreateIssue", **self.filing)
        assert (self.issue.version, self.issue.status, self.issue.priority) == (1, 1, 3), self.issue
        assert self.issue.reporter_id == self.user.id

    def filing_it_again_answers_the_same(self):
        assert self.call("IssueService", "CreateIssue", **self.filing) == self.issue
        other = {**self.filing, "issue": {"title": "another"}}
        self.fails(grpc.StatusCode.INVALID_ARGUMENT, "REQUEST_ID_REUSED", "IssueService", "CreateIssue", **other)

    def an_issue_without_a_title_is_invalid(self):
        details = self.fails(
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID", "IssueService", "CreateIssue", issue={"priority": 99}
        )
        fields = {violation.field for violation in details["google.rpc.BadRequest"].field_violations}
        assert fields == {"issue.title", "issue.priority"}, fields

    def a_comment_is_added_and_answered(self):
        comment = {"issue_id": self.issue.id, "content": "it does"}
        self.comment = self.call("CommentService", "CreateComment", comment=comment)
        reply = {"issue_id": self.issue.id, "content": "since when?", "parent_id": self.comment.id}
        self.reply = self.call("CommentService", "CreateComment", comment=reply)
        assert self.reply.parent_id == self.comment.id

    def the_issue_is_read_in_both_views(self):
        basic = self.call("IssueService", "GetIssue", id=self.issue.id)
        assert (basic.comment_count, len(basic.comments)) == (2, 0), basic
        view = self.tracker.number("IssueView", "ISSUE_VIEW_FULL")
        full = self.call("IssueService", "GetIssue", id=self.issue.id, view=view)
        assert [comment.content for comment in full.comments] == ["it does", "since when?"], full

    def a_missing_issue_is_named(self):
        missing = str(uuid.uuid4())
        details = self.fails(grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "IssueService", "GetIssue", id=missing)
        assert details["google.rpc.ResourceInfo"].resource_name == missing

    def a_masked_update_changes_only_what_it_names(self):
        changed = {"id": self.issue.id, "title": f"crash on stop {self.mark}", "description": "left out"}
        mask = self.tracker.message("google.protobuf.FieldMask", paths=["title", "priority"])
        updated = self.call("IssueService", "UpdateIssue", issue=changed, update_mask=mask, expected_version=1)
        assert (updated.title, updated.description, updated.priority) == (changed["title"], "why?", 0), updated
        assert updated.version == 2

    def a_stale_update_is_aborted(self):
        issue = {"id": self.issue.id, "title": "too late"}
        details = self.fails(
            grpc.StatusCode.ABORTED, "VERSION_MISMATCH", "IssueService", "UpdateIssue", issue=issue, expected_version=1
        )
        assert details["google.rpc.ErrorInfo"].metadata["current_version"] == "2"

    def labels_are_put_on_and_taken_off(self):
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

    def a_list_is_filtered_and_read_in_pages(self):
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

    def many_are_closed_at_once_or_none(self):
        closed = self.tracker.number("Status", "STATUS_CLOSED")
        missing = [*self.batch, str(uuid.uuid4())]
        details = self.fails(
            grpc.StatusCode.NOT_FOUND, "NOT_FOUND", "IssueService", "BulkUpdateStatus", ids=missing, status=closed
        )
        assert details["google.rpc.BadRequest"].field_violations[0].field == "ids[5]"
        answer = self.call("IssueService", "BulkUpdateStatus", ids=self.batch, status=closed, comment="done")
        assert answer.changed_count == 5 and [result.version for result in answer.results] == [2] * 5, answer
        again = self.call("IssueService", "BulkUpdateStatus", ids=self.batch, status=closed)
        assert again.changed_count == 0 and [result.version for result in again.results] == [2] * 5, again

    def csv(self, rows):
        lines = ["title,description,priority,status,external_id"]
        lines += [f'"row {n}, {self.mark}",line one,high,open,{self.mark}-{n}' for n in range(1, rows + 1)]
        return lines

    def a_file_with_bad_rows_is_imported_without_them(self):
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

    def an_import_that_is_sent_again_answers_its_summary(self):
        errors, summary = self.tracker.import_csv(**self.imported)
        assert (errors, summary) == ([], self.summary), summary

    def an_atomic_import_with_a_bad_row_is_rejected(self):
        lines = [line.replace(self.mark, f"{self.mark}-atomic") for line in self.csv(10)]
        lines[5] += ",one too many"
        errors, summary = self.tracker.import_csv("\n".join(lines).encode(), chunk_bytes=7)
        assert [(error.row_number, error.line_number) for error in errors] == [(5, 6)], errors
        assert summary.state == self.tracker.number("ImportState", "IMPORT_STATE_REJECTED"), summary
        assert (summary.created_count, summary.rejected_count) == (0, 1), summary
        assert not self.call("IssueService", "ListIssues", filter=f'"{self.mark}-atomic"').issues

    def an_import_that_is_given_up_writes_nothing(self):
        stub = self.tracker.channel.stream_stream(
            f"/{PACKAGE}.ImportService/ImportIssues", request_serializer=lambda message: message.SerializeToString()
        )
        request = message_factory.GetMessageClass(self.tracker.method("ImportService", "ImportIssues").input_type)
        mode = self.tracker.number("ImportMode", "IMPORT_MODE_SKIP_INVALID")
        options = {"mode": mode, "import_id": str(uuid.uuid4())}

        def requests():
            yield request(options=self.tracker.message("ImportOptions", **options))
            data = f"title\nwhole given-up-{self.mark}\nhalf given-up-{self.mark}".encode()
            yield request(chunk=self.tracker.message("ImportChunk", data=data))
            time.sleep(DEADLINE_SECONDS)

        call = stub(requests(), metadata=self.tracker.metadata)
        next(call)
        call.cancel()
        # Had any of it been written, this would be answered as the same import.
        _, summary = self.once_not_running(lambda: self.tracker.import_csv(b"title\n", **options))
        assert (summary.row_count, summary.byte_count) == (0, 6), summary
        assert not self.call("IssueService", "ListIssues", filter=f'"given-up-{self.mark}"').issues

    def once_not_running(self, attempt):
        for _ in range(300):
            try:
                return attempt()
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.ABORTED:
                    raise
                time.sleep(0.1)
        raise AssertionError("the import that was given up still runs")

    def reports_count_what_was_done(self):
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
    helpers = {"csv", "once_not_running"}
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

# Copyright (c) 2026, pgdrill.pitr contributors
# GNU General Public License v3.0+ (see LICENSE or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One mutation for each refusal and guard of the engine, with the tests that must notice it."""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = "plugins/module_utils"
TARGETS = "tests/integration/test_restore_targets.py"
REFUSALS = "tests/integration/test_restore_refusals.py"
TIMELINES = "tests/integration/test_restore_timelines.py"
FAULTS = "tests/integration/test_restore_faults.py"
AFTER = "tests/integration/test_restore_after.py"
PLACES = "tests/integration/test_tablespaces_and_names.py"
BACKUP = "tests/integration/test_base_backup.py"
ARCHIVING = "tests/integration/test_archiving.py"


@dataclass(frozen=True)
class Mutation:
    """``text`` occurs exactly once in ``file``. Every one of ``tests`` (pytest node ids) fails with ``replacement``."""

    name: str
    file: str
    text: str
    replacement: str
    tests: tuple[str, ...]


def _mutation(name: str, module: str, text: str, replacement: str, *tests: str) -> Mutation:
    return Mutation(f"{module}: {name}", f"{ENGINE}/{module}.py", text, replacement, tests)


MUTATIONS = (
    # --- archive: push
    _mutation(
        "a foreign system identifier is archived",
        "archive",
        "if header.system_identifier != chapter.system_identifier:",
        "if False:",
        "tests/unit/test_archive.py::test_segment_of_another_cluster_is_refused",
        f"{ARCHIVING}::test_second_cluster_in_the_same_folder_is_refused",
    ),
    _mutation(
        "another segment size is archived",
        "archive",
        "if header.segment_size != chapter.wal_segment_size:",
        "if False:",
        "tests/unit/test_archive.py::test_segment_that_tells_another_segment_size_is_refused",
    ),
    _mutation(
        "the position in the header is not compared with the name",
        "archive",
        "if int(header.page_address) != number * header.segment_size:",
        "if False:",
        "tests/unit/test_archive.py::test_segment_from_another_position_than_its_name_is_refused",
        f"{FAULTS}::test_damaged_segment_stops_the_recovery_and_a_whole_one_lets_it_go_on[_other_position]",
    ),
    _mutation(
        "the timeline in the header is not compared with the name",
        "archive",
        "if header.timeline == wal_file.timeline:",
        "if True:",
        "tests/unit/test_archive.py::test_segment_of_another_timeline_than_its_name_is_refused",
        "tests/unit/test_archive.py::test_header_timeline_that_the_history_does_not_explain_is_refused",
    ),
    _mutation(
        "any ancestor may have written the first segment",
        "archive",
        "if writer == [header.timeline] and begin < own.begin < begin + header.segment_size:",
        "if any(span.timeline == header.timeline for span in ancestors):",
        "tests/unit/test_archive.py::test_header_timeline_that_the_history_does_not_explain_is_refused",
    ),
    _mutation(
        "a segment of the wrong size is archived",
        "archive",
        "if size != chapter.wal_segment_size:\n                raise PitrError(\n",
        "if False:\n                raise PitrError(\n",
        "tests/unit/test_archive.py::test_segment_of_the_wrong_size_is_refused",
    ),
    _mutation(
        "a duplicate with other content is a success",
        "archive",
        "    if not same:\n",
        "    if False:\n",
        "tests/unit/test_archive.py::test_different_duplicate_is_refused_and_nothing_changes",
        f"{ARCHIVING}::test_exit_codes_of_the_installed_command",
    ),
    _mutation(
        "a stored segment is replaced",
        "tree",
        "            os.link(temporary, path)\n",
        "            os.rename(temporary, path); open(temporary, 'w').close()\n",
        "tests/unit/test_archive.py::test_of_different_contents_pushed_at_once_exactly_one_wins",
    ),
    _mutation(
        "a duplicate is a success before it is on stable storage",
        "archive",
        '    tree.settle(stored)\n    return f"{os.path.basename(path)} was already',
        '    return f"{os.path.basename(path)} was already',
        "tests/unit/test_archive.py::test_duplicate_is_on_stable_storage_before_success_is_said",
    ),
    # --- archive: get
    _mutation(
        "a hole is the end of the archive",
        "archive",
        "    if later is not None:\n",
        "    if False:\n",
        "tests/unit/test_archive.py::test_hole_in_the_middle_is_an_error_and_names_the_later_segment",
        f"{FAULTS}::test_damaged_segment_stops_the_recovery_and_a_whole_one_lets_it_go_on[_delete]",
        f"{ARCHIVING}::test_exit_codes_of_the_installed_command",
    ),
    _mutation(
        "a missing history file is absent although its timeline is there",
        "archive",
        "if wal_file.timeline > 1 and any(archived_logs(archive, wal_file.timeline, tree)):",
        "if False:",
        "tests/unit/test_archive.py::test_missing_history_is_an_error_while_segments_of_its_timeline_are_there",
    ),
    _mutation(
        "an archive that is gone is an empty one",
        "archive",
        "    if not folder.tree.exists(archive):\n",
        "    if not folder.tree.exists(archive):\n        raise Absent(name)\n    if False:\n",
        "tests/unit/test_archive.py::test_archive_folder_that_is_gone_is_an_error",
    ),
    _mutation(
        "a stored segment that is too short is delivered",
        "archive",
        '            if size != chapter.wal_segment_size:\n                raise PitrError(f"{stored} is damaged',
        '            if False:\n                raise PitrError(f"{stored} is damaged',
        "tests/unit/test_archive.py::test_stored_segment_that_is_too_long_is_an_error",
    ),
    _mutation(
        "what is delivered is not compared with its name",
        "archive",
        "            check_segment(head, wal_file, chapter, stored, history)\n",
        "",
        "tests/unit/test_archive.py::test_stored_segment_that_is_not_what_its_name_says_is_not_delivered",
        f"{FAULTS}::test_damaged_segment_stops_the_recovery_and_a_whole_one_lets_it_go_on[_other_position]",
    ),
    # --- cli: the exit codes that PostgreSQL reads
    _mutation(
        "a failure of get may leave as the end of the archive",
        "cli",
        'get:*) if [ "$status" -gt 125 ]; then exit "$status"; fi; exit 200 ;;',
        'get:*) exit "$status" ;;',
        f"{ARCHIVING}::test_exit_codes_of_the_installed_command",
        f"{FAULTS}::test_broken_interpreter_of_pitr_wal_is_no_end_of_the_archive",
        f"{FAULTS}::test_damaged_segment_stops_the_recovery_and_a_whole_one_lets_it_go_on[_cut]",
    ),
    _mutation(
        "absence ends the recovery",
        "cli",
        "get:{absent}) exit 1 ;;",
        "get:{absent}) exit 200 ;;",
        f"{ARCHIVING}::test_exit_codes_of_the_installed_command",
        f"{TARGETS}::test_target_lands_on_the_predicted_row[latest]",
    ),
    _mutation(
        "a crash of push hides from pg_stat_archiver",
        "cli",
        '*) if [ "$status" -gt 125 ]; then exit 125; fi; exit "$status" ;;',
        "*) exit 126 ;;",
        f"{ARCHIVING}::test_failure_of_pitr_wal_is_seen_in_pg_stat_archiver",
        f"{ARCHIVING}::test_exit_codes_of_the_installed_command",
    ),
    _mutation(
        "a failure of push is a success",
        "cli",
        "FAILED = 1\n",
        "FAILED = 0\n",
        f"{ARCHIVING}::test_exit_codes_of_the_installed_command",
        f"{ARCHIVING}::test_repository_that_is_away_for_a_while_loses_nothing",
    ),
    _mutation(
        "the environment of the server reaches the interpreter",
        "cli",
        "{python} -I -S {library}",
        "{python} {library}",
        f"{ARCHIVING}::test_command_does_not_read_the_environment_of_the_server",
    ),
    # --- repository
    _mutation(
        "a directory without the marker is a repository",
        "repository",
        "            read_json(os.path.join(repository, MARKER), folder.tree)\n",
        "            pass\n",
        "tests/unit/test_repository.py::test_unmounted_repository_is_an_error",
        f"{REFUSALS}::test_directory_without_the_marker_is_no_repository",
    ),
    _mutation(
        "a folder is anybody's",
        "repository",
        "            if chapter.system_identifier == system_identifier:\n",
        "            if True:\n",
        "tests/unit/test_repository.py::test_folder_of_another_cluster_is_refused_and_unchanged",
        f"{BACKUP}::test_other_cluster_is_refused",
        f"{ARCHIVING}::test_second_cluster_in_the_same_folder_is_refused",
    ),
    _mutation(
        "a directory with other things in it becomes a repository",
        "repository",
        'if os.path.isdir(repository) and [entry for entry in os.listdir(repository) if entry != "lost+found"]:',
        "if False:",
        "tests/unit/test_repository.py::test_directory_with_other_things_does_not_become_a_repository",
    ),
    _mutation(
        "a newer format is read as if it were known",
        "repository",
        'if value["format"] > FORMAT:',
        "if False:",
        f"{REFUSALS}::test_damaged_description_of_a_backup_is_named[a newer format]",
    ),
    _mutation(
        "a cluster's name may lead out of the repository",
        "repository",
        "    if not _CLUSTER_NAME.match(name):\n",
        "    if False:\n",
        "tests/unit/test_repository.py::test_cluster_name_that_would_not_be_one_folder_is_refused",
    ),
    # --- plan
    _mutation(
        "an empty repository is no refusal of its own",
        "plan",
        "    if not backups:\n        raise RefusedError(\n",
        "    if False:\n        raise RefusedError(\n",
        f"{REFUSALS}::test_empty_repository_is_refused",
    ),
    _mutation(
        "a damaged backup is taken",
        "plan",
        "whole = [backup for backup in related if backup.label not in damaged]",
        "whole = list(related)",
        f"{REFUSALS}::test_backup_that_is_cut_is_passed_over_and_named",
        f"{REFUSALS}::test_no_whole_backup_left_is_refused_and_every_damaged_file_is_named",
    ),
    _mutation(
        "a target that was not found is tried",
        "plan",
        'if location is None and target.kind in ("xid", "name"):',
        "if False:",
        f"{REFUSALS}::test_transaction_that_is_not_in_the_archive_is_refused",
        f"{REFUSALS}::test_restore_point_that_is_not_in_the_archive_is_refused",
    ),
    _mutation(
        "a backup of a time target is chosen by its start",
        "plan",
        "return backup.stopped_at <= target.time",
        "return backup.started_at <= target.time",
        "tests/unit/test_plan.py::test_backup_of_a_time_target_had_stopped_before_it",
        f"{REFUSALS}::test_target_before_the_end_of_the_first_backup_is_refused",
    ),
    _mutation(
        "a backup of an lsn target is chosen by its start",
        "plan",
        "return backup.stop_lsn <= target.lsn",
        "return backup.start_lsn <= target.lsn",
        "tests/unit/test_plan.py::test_backup_is_chosen_by_its_stop_and_not_by_its_start",
        f"{REFUSALS}::test_target_before_the_end_of_the_first_backup_is_refused",
    ),
    _mutation(
        "a backup of a transaction is chosen whatever it holds",
        "plan",
        "return backup.stop_lsn <= location.lsn",
        "return True",
        "tests/unit/test_plan.py::test_backup_of_a_transaction_or_name_stopped_before_its_record",
    ),
    _mutation(
        "the oldest backup is chosen",
        "plan",
        "backup = max(fitting, key=",
        "backup = min(fitting, key=",
        f"{TARGETS}::test_backup_chosen_for_every_kind_of_target_is_the_newest_that_ends_before_it[third]",
    ),
    _mutation(
        "an unknown timeline is followed",
        "plan",
        '        raise RefusedError([Refusal("timeline_unknown", error.message)]) from None\n',
        "        pass\n",
        f"{REFUSALS}::test_unknown_timeline_is_refused_and_the_known_ones_are_named",
    ),
    _mutation(
        "latest falls back to an older timeline when a history file is missing",
        "plan",
        "if tree.timelines and tree.timelines[-1] > newest:",
        "if False:",
        "tests/unit/test_plan.py::test_latest_does_not_fall_back_when_the_newest_history_is_missing",
        f"{TIMELINES}::test_timeline_without_its_history_file_is_refused_and_not_left_out",
    ),
    _mutation(
        "an unknown label means any backup",
        "plan",
        "        if not named:\n",
        "        named = named or list(backups)\n        if False:\n",
        f"{REFUSALS}::test_unknown_backup_is_refused_and_the_known_ones_are_named",
    ),
    _mutation(
        "a backup of an abandoned branch is taken",
        "plan",
        "related = [backup for backup in backups if tree.contains(timeline, backup.timeline, backup.stop_lsn)]",
        "related = list(backups)",
        f"{TIMELINES}::test_backup_of_an_abandoned_branch_is_refused_for_the_newest_timeline",
    ),
    _mutation(
        "a hole is overlooked",
        "plan",
        "                missing.append((span.timeline, number))\n",
        "",
        f"{REFUSALS}::test_hole_in_the_archive_is_refused_and_the_missing_segments_are_named",
        f"{REFUSALS}::test_backup_without_its_own_wal_is_refused",
    ),
    _mutation(
        "the parent's copy stands for a timeline's lost first segment",
        "plan",
        "(index.last(span.timeline) or 0) < number:",
        "True:",
        f"{TIMELINES}::test_first_segment_of_a_timeline_is_missed_when_later_ones_are_there",
    ),
    _mutation(
        "an lsn behind the end of the archive is tried",
        "plan",
        "elif last > last_there:",
        "elif False:",
        f"{REFUSALS}::test_target_beyond_the_archive_is_refused",
        f"{REFUSALS}::test_tail_that_is_missing_makes_targets_in_it_unreachable",
    ),
    _mutation(
        "a time behind the last transaction is tried",
        "plan",
        "elif target.time is not None and last_commit is not None and not _stops_before(target, last_commit):",
        "elif False:",
        "tests/unit/test_plan.py::test_time_needs_a_later_transaction_in_the_archive",
        f"{REFUSALS}::test_target_beyond_the_archive_is_refused",
    ),
    # --- timeline
    _mutation(
        "positions in a history file must ascend",
        "timeline",
        "end = min(switches[position].lsn, spans[0].begin)",
        "end = switches[position].lsn",
        "tests/unit/test_timeline.py::test_path_leaves_out_a_timeline_that_the_recovery_never_came_to",
        f"{TIMELINES}::test_recovery_that_ends_before_its_timeline_began_leaves_an_archive_that_can_be_restored",
    ),
    # --- target
    _mutation(
        "a time without an offset is taken for UTC",
        "target",
        "    if offset is None:\n",
        '    offset = offset or "Z"\n    if False:\n',
        f"{REFUSALS}::test_time_without_an_offset_is_refused",
    ),
    _mutation(
        "the first of two targets is taken",
        "target",
        "        if len(given) > 1:\n",
        "        if False:\n",
        f"{REFUSALS}::test_two_targets_are_refused_and_both_named",
    ),
    # --- restore: may this directory be replaced?
    _mutation(
        "a running server is not seen",
        "restore",
        '            message = f"A server is running in {pgdata} (process {pid})."\n',
        "            pid = None\n        if pid is not None:\n            message = ''\n",
        f"{REFUSALS}::test_running_server_is_refused_even_with_force",
        f"{REFUSALS}::test_everything_that_is_wrong_is_told_at_once",
    ),
    _mutation(
        "a directory with something else in it is replaced",
        "restore",
        'if "PG_VERSION" not in found or data_version(pgdata) is None:',
        "if False:",
        f"{REFUSALS}::test_directory_with_something_else_in_it_is_refused",
    ),
    _mutation(
        "another cluster's directory is replaced",
        "restore",
        "        if identifier != folder.chapter.system_identifier:\n",
        "        if False:\n",
        f"{REFUSALS}::test_directory_of_another_cluster_is_refused",
    ),
    _mutation(
        "a directory is replaced without force",
        "restore",
        "        elif not self._request.force:\n",
        "        elif False:\n",
        f"{REFUSALS}::test_directory_that_is_not_empty_is_refused_without_force",
    ),
    _mutation(
        "what another cluster's restore has left is cleared away",
        "restore",
        'if isinstance(found, dict) and found.get("system_identifier") == folder.chapter.system_identifier:',
        "if isinstance(found, dict):",
        f"{REFUSALS}::test_directory_with_something_else_in_it_is_refused",
    ),
    # --- restore: can this host run it?
    _mutation(
        "another major version is tried",
        "restore",
        "if version != result.backup.postgresql_version:",
        "if False:",
        f"{REFUSALS}::test_programs_of_another_major_version_are_refused",
    ),
    _mutation(
        "a missing pitr-wal is found out by the recovery",
        "restore",
        "if not os.access(request.wal_command, os.X_OK):",
        "if False:",
        f"{REFUSALS}::test_missing_pitr_wal_is_refused",
    ),
    _mutation(
        "a place that cannot be written is found out on the way",
        "restore",
        "if not os.access(existing, os.W_OK):",
        "if False:",
        f"{REFUSALS}::test_place_that_cannot_be_written_is_refused",
    ),
    _mutation(
        "a mapping for nothing is overlooked",
        "restore",
        "        if unknown:\n",
        "        if False:\n",
        f"{REFUSALS}::test_mapping_of_a_tablespace_that_is_not_in_the_backup_is_refused",
    ),
    _mutation(
        "a tablespace directory that is taken is used",
        "restore",
        "if os.path.isdir(location) and _foreign_content(location, location in left_behind):",
        "if False:",
        f"{PLACES}::test_tablespace_whose_place_is_taken_is_refused",
    ),
    _mutation(
        "content that came later is cleared from a tablespace directory",
        "restore",
        'return any(not name.startswith("PG_") for name in names) if left_behind else bool(names)',
        "return not left_behind and bool(names)",
        f"{PLACES}::test_killed_restore_with_a_tablespace_can_be_repeated",
    ),
    _mutation(
        "a configuration directory without a configuration is used",
        "restore",
        'self._refuse("config_dir", f"{request.config_dir} holds no postgresql.conf.")',
        "pass",
        f"{REFUSALS}::test_configuration_directory_without_a_configuration_is_refused",
    ),
    # --- restore: do it
    _mutation(
        "the files are not compared with the manifest",
        "restore",
        "            if self._request.verify:\n",
        "            if False:\n",
        f"{FAULTS}::test_byte_flipped_in_an_uncompressed_backup_is_noticed_by_its_checksum",
        f"{FAULTS}::test_damaged_backup_is_noticed_and_the_old_directory_is_back_and_starts[_damage_manifest]",
    ),
    _mutation(
        "the manifest itself is not checked",
        "extract",
        "if sha256(stored, tree) != expected:",
        "if False:",
        f"{FAULTS}::test_damaged_backup_is_noticed_and_the_old_directory_is_back_and_starts[_swap_all]",
    ),
    _mutation(
        "pg_control is in its place from the beginning",
        "extract",
        'name = HELD_BACK if member.name.lstrip("./") == PG_CONTROL else member.name',
        "name = member.name",
        f"{FAULTS}::test_killed_restore_loses_nothing_and_can_be_repeated[middle]",
    ),
    _mutation(
        "the old directory is removed",
        "restore",
        "        os.rename(pgdata, aside)\n",
        "        shutil.rmtree(pgdata); os.mkdir(aside)\n",
        f"{AFTER}::test_old_directory_is_moved_aside_whole_and_starts",
        f"{FAULTS}::test_damaged_backup_is_noticed_and_the_old_directory_is_back_and_starts",
    ),
    _mutation(
        "a failure leaves the old directory aside",
        "restore",
        "            self._put_back(moved_aside, locations, progress, was_there)\n",
        "",
        f"{FAULTS}::test_damaged_backup_is_noticed_and_the_old_directory_is_back_and_starts",
        f"{PLACES}::test_failed_restore_leaves_the_tablespaces_place_empty",
    ),
    _mutation(
        "a failure leaves the recovery's settings outside the data directory",
        "restore",
        "        recovery_conf.discard(self._request.configuration)\n",
        "",
        f"{AFTER}::test_setting_that_would_win_over_the_recoverys_is_refused_and_the_old_directory_is_back",
    ),
    _mutation(
        "the marker is removed first",
        "restore",
        "            elif name != IN_PROGRESS:\n",
        "            else:\n",
        f"{FAULTS}::test_restore_killed_again_while_it_clears_up_can_still_be_repeated",
    ),
    _mutation(
        "a repeated restore forgets the old directory",
        "restore",
        'return old if os.path.isdir(old) else ""',
        'return ""',
        f"{FAULTS}::test_repeated_restore_still_knows_the_old_directory",
    ),
    _mutation(
        "a clone archives into the archive it came from",
        "restore",
        '            settings["archive_mode"] = "off"\n',
        "            pass\n",
        f"{AFTER}::test_clone_never_archives",
    ),
    _mutation(
        "a restored cluster archives before it is accepted",
        "restore",
        '"hold", request.cluster]',
        '"push", request.cluster]',
        f"{AFTER}::test_restored_cluster_archives_nothing_until_it_is_accepted_and_then_everything",
    ),
    _mutation(
        "settings lower than the primary's stay",
        "restore",
        "            if int(self._effective(name)) < floor:\n",
        "            if False:\n",
        f"{AFTER}::test_settings_lower_than_the_primarys_are_raised_for_the_recovery",
    ),
    _mutation(
        "a setting that wins over the recovery's is overlooked",
        "restore",
        "            if name in expected and value != expected[name]:\n",
        "            if False:\n",
        f"{AFTER}::test_setting_that_would_win_over_the_recoverys_is_refused_and_the_old_directory_is_back",
    ),
    _mutation(
        "settings outside the data directory make the original an unaccepted cluster",
        "restore",
        "    if planned is None:\n        return False\n",
        "    return planned is not None\n",
        f"{AFTER}::test_original_is_never_taken_for_an_unaccepted_cluster",
    ),
    _mutation(
        "undo under a running server",
        "restore",
        '    if pid is not None:\n        raise PitrError(f"A server',
        '    if False:\n        raise PitrError(f"A server',
        f"{AFTER}::test_undo_puts_the_old_directory_back_and_keeps_the_restored_one",
    ),
    _mutation(
        "undo replaces an accepted cluster",
        "restore",
        "if not _unaccepted(request) or control_data(request.bin_dir, pgdata).system_identifier != ours:",
        "if control_data(request.bin_dir, pgdata).system_identifier != ours:",
        f"{AFTER}::test_undo_refuses_what_would_lose_data",
    ),
    _mutation(
        "undo puts another cluster's directory in place",
        "restore",
        "if not _unaccepted(request) or control_data(request.bin_dir, pgdata).system_identifier != ours:",
        "if not _unaccepted(request):",
        f"{AFTER}::test_undo_refuses_another_clusters_directory",
    ),
    _mutation(
        "the old directory is removed before the new one is accepted",
        "restore",
        '        raise PitrError(f"The restored cluster in {pgdata} is not accepted yet; {moved_aside} stays.")\n',
        "        pass\n",
        f"{AFTER}::test_old_directory_is_removed_only_when_the_new_one_is_accepted",
    ),
    _mutation(
        "another cluster's directory is removed as the old one",
        "restore",
        '        raise PitrError(f"{moved_aside} is another cluster, or a server is running on it. It stays.")\n',
        "        pass\n",
        f"{AFTER}::test_old_directory_is_removed_only_when_the_new_one_is_accepted",
    ),
    # --- recovery settings
    _mutation(
        "stale recovery targets of ALTER SYSTEM stay",
        "recovery_conf",
        "        if found and (stale or found[0][0] in names):\n",
        "        if False:\n",
        f"{AFTER}::test_settings_of_alter_system_neither_steer_the_recovery_nor_get_lost",
    ),
    _mutation(
        "what was taken out of ALTER SYSTEM is lost",
        "recovery_conf",
        "    if saved:\n",
        "    if False:\n",
        f"{AFTER}::test_settings_of_alter_system_neither_steer_the_recovery_nor_get_lost",
    ),
    _mutation(
        "standby.signal stays beside recovery.signal",
        "recovery_conf",
        '        os.unlink(os.path.join(pgdata, "standby.signal"))\n',
        "        pass\n",
        f"{AFTER}::test_settings_of_alter_system_neither_steer_the_recovery_nor_get_lost",
    ),
    # --- backup
    _mutation(
        "a backup without archiving is taken",
        "backup",
        'if facts["archive_mode"] == "off":',
        "if False:",
        f"{BACKUP}::test_archive_mode_off_is_refused",
    ),
    _mutation(
        "a backup is taken from a standby",
        "backup",
        'if facts["standby"]:',
        "if False:",
        f"{BACKUP}::test_standby_is_refused",
    ),
    _mutation(
        "older programs are tried",
        "backup",
        'if version < facts["version"]:',
        "if False:",
        "tests/integration/test_base_backup.py::test_programs_older_than_the_server_are_refused",
    ),
    _mutation(
        "a label may lead out of the repository",
        "backup",
        'if self._label and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self._label):',
        "if False:",
        f"{BACKUP}::test_label_that_is_no_name_of_a_directory_is_refused",
    ),
    _mutation(
        "two backups share a directory",
        "backup",
        "        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        f"{BACKUP}::test_two_backups_in_one_second_have_two_names",
        f"{BACKUP}::test_two_backups_of_one_label_at_once_do_not_harm_each_other",
    ),
    _mutation(
        "an archiver that is stuck is waited for",
        "backup",
        "if now - waiting_since > self._archive_timeout:",
        "if now - waiting_since > 15 * self._archive_timeout:",
        f"{BACKUP}::test_archiver_that_is_stuck_ends_the_backup_by_name",
    ),
    _mutation(
        "a server that archives elsewhere is believed",
        "backup",
        "                self._await_wal(backup)\n",
        "",
        f"{BACKUP}::test_server_that_archives_elsewhere_is_found_out",
    ),
    _mutation(
        "a directory without a description is a backup",
        "backup",
        '        if name.startswith("."):\n            continue\n        try:\n'
        "            backups.append(Backup.from_dict(read_json(document, folder.tree)))\n"
        "        except (FileNotFoundError, NotADirectoryError):\n",
        "        try:\n            backups.append(Backup.from_dict(read_json(document, folder.tree)))\n"
        "        except ZeroDivisionError:\n",
        f"{BACKUP}::test_killed_backup_is_never_visible_and_its_name_can_be_used_again",
    ),
    _mutation(
        "the history file of the backup's timeline is left to the archiver",
        "backup",
        "                self._keep_history(backup.timeline)\n",
        "",
        f"{BACKUP}::test_cluster_that_was_promoted_before_it_archived_here_can_be_restored",
    ),
    _mutation(
        "a failed backup stays",
        "backup",
        "            except BaseException:\n                shutil.rmtree(partial, ignore_errors=True)\n",
        "            except BaseException:\n",
        f"{BACKUP}::test_archiver_that_is_stuck_ends_the_backup_by_name",
        f"{BACKUP}::test_server_that_dies_meanwhile_leaves_no_backup",
    ),
    _mutation(
        "the size of stored files is not compared",
        "backup",
        "            if size != file.size:\n",
        "            if False:\n",
        f"{REFUSALS}::test_backup_that_is_cut_is_passed_over_and_named",
    ),
    # --- recovery: where did it stop?
    _mutation(
        "where a recovery stopped is not compared with what was planned",
        "recovery",
        'return "" if fits else f"asked for',
        'return "" if True else f"asked for',
        "tests/unit/test_recovery.py::test_value_and_side_of_the_stop_are_compared",
        "tests/unit/test_recovery.py::test_promotion_at_the_end_of_the_archive_instead_of_the_target_is_an_error",
    ),
    _mutation(
        "a pause or shutdown is proof enough",
        "recovery",
        'if not reason or planned.get("target_action") == "promote":',
        "if False:",
        f"{TARGETS}::test_shutdown_by_somebody_before_the_target_is_no_success",
        f"{TARGETS}::test_pause_by_somebody_before_the_target_is_no_success",
    ),
    _mutation(
        "an earlier start's log is proof",
        "recovery",
        "        elif _STARTED in line:\n",
        "        elif False:\n",
        "tests/unit/test_recovery.py::test_log_of_an_earlier_start_proves_nothing",
    ),
    _mutation(
        "a pause for raised settings of the primary is not told apart",
        "recovery",
        "        if low:\n",
        "        if False:\n",
        f"{AFTER}::test_settings_that_the_primary_raised_after_the_backup_stop_the_recovery_by_name",
    ),
    _mutation(
        "a server that died has reached its target",
        "recovery",
        'if action == "shutdown" and data.state == "shut down in recovery":',
        "if True:",
        "tests/unit/test_recovery.py::test_server_that_died_is_an_error_with_its_last_words",
    ),
    # --- probe
    _mutation(
        "the content in the repository is not compared",
        "probe",
        "                if ours != reader.read(codec.CHUNK):\n",
        "                reader.read(codec.CHUNK)\n                if False:\n",
        f"{ARCHIVING}::test_probe_compares_the_content",
    ),
    _mutation(
        "archive_mode off is waited for",
        "probe",
        '        if mode == "off":\n',
        "        if False:\n",
        f"{ARCHIVING}::test_probe_refuses_a_server_that_does_not_archive",
    ),
    # --- roles
    Mutation(
        "drill: a drill needs no confirmation",
        "roles/drill/tasks/preflight.yml",
        'that: "{{ drill_confirm == pitr_cluster }}"',
        "that: true",
        ("tests/integration/test_playbooks.py::test_nothing_is_destroyed_without_the_right_word",),
    ),
    Mutation(
        "restore role: a restore needs no confirmation",
        "roles/restore/tasks/main.yml",
        "that: restore_confirm == pitr_cluster",
        "that: true",
        ("tests/integration/test_playbooks.py::test_nothing_is_destroyed_without_the_right_word",),
    ),
)

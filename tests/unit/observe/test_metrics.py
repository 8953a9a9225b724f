"""The metrics: the names of the Go program, buckets, resources that come and go, reloads."""

from __future__ import annotations

from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.rigs.tasks import result_of
from usbip_plugin.config.schema import MAX_ALLOCATE_TIMEOUT_S
from usbip_plugin.model import Advertised, DeviceKey, Health, Reason, ServerKey
from usbip_plugin.observe.metrics import Metrics

RESOURCE = "usbip.dev/storage"


def samples(metrics: Metrics) -> dict[tuple[str, str], float]:
    text, content_type = result_of(metrics.render())
    assert content_type.startswith("text/plain")
    return {
        (sample.name, ",".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def advertised(*reasons: Reason) -> tuple[Advertised, ...]:
    keys = [DeviceKey(ServerKey("lab"), f"1-{number}") for number, _ in enumerate(reasons, 1)]
    return tuple(Advertised(key.id, key, Health(reason)) for key, reason in zip(keys, reasons, strict=True))


def test_the_metrics_of_the_go_program_have_the_label_resource() -> None:
    metrics = Metrics()
    metrics.devices(RESOURCE, advertised(*[Reason.FREE] * 2, Reason.ATTACHED, *[Reason.HELD_ELSEWHERE] * 4))
    metrics.allocated(RESOURCE, 0.1)
    metrics.allocated(RESOURCE, 0.1)
    metrics.registered(RESOURCE, again=False)
    metrics.registered(RESOURCE, again=True)
    found = samples(metrics)
    assert found["usbip_device_plugin_available_devices", RESOURCE] == 3
    assert found["usbip_device_plugin_attached_devices", RESOURCE] == 1
    assert found["usbip_device_plugin_allocations_total", RESOURCE] == 2
    assert found["usbip_device_plugin_restarts_total", RESOURCE] == 1
    assert found["device_plugin_restarts_total", RESOURCE] == 1
    assert found["usbip_device_plugin_devices", f"held_elsewhere,{RESOURCE}"] == 4
    metrics.devices(RESOURCE, advertised(Reason.HELD_ELSEWHERE))
    assert samples(metrics)["usbip_device_plugin_available_devices", RESOURCE] == 0
    assert samples(metrics)["usbip_device_plugin_devices", f"free,{RESOURCE}"] == 0


def test_the_buckets_reach_to_the_longest_allocate() -> None:
    metrics = Metrics()
    metrics.allocated(RESOURCE, MAX_ALLOCATE_TIMEOUT_S)
    text, _content_type = result_of(metrics.render())
    bound = f'allocate_seconds_bucket{{le="{MAX_ALLOCATE_TIMEOUT_S}",result="allocated"}} 1.0'
    assert bound in text.decode()


def test_a_forgotten_resource_has_no_series() -> None:
    metrics = Metrics()
    metrics.forget("never/seen")
    metrics.devices(RESOURCE, advertised(Reason.FREE))
    metrics.allocated(RESOURCE, 0.1)
    metrics.forget(RESOURCE)
    found = samples(metrics)
    assert ("usbip_device_plugin_available_devices", RESOURCE) not in found
    assert not [name for name in found if name[0] == "usbip_device_plugin_devices"]
    assert ("usbip_device_plugin_allocations_total", RESOURCE) not in found


def test_two_nodes_in_one_process_have_their_own_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.step("lock", 0.02)
    one.config_reload_failed()
    assert samples(one)["usbip_device_plugin_step_seconds_count", "lock"] == 1
    assert samples(one)["usbip_device_plugin_config_reload_failed", ""] == 1
    assert ("usbip_device_plugin_step_seconds_count", "lock") not in samples(other)
    assert samples(other)["usbip_device_plugin_config_reload_failed", ""] == 0


def test_a_good_reload_ends_a_failed_one() -> None:
    metrics = Metrics()
    metrics.config_loaded(100.0)
    metrics.config_reload_failed()
    assert samples(metrics)["usbip_device_plugin_config_last_reload_success_timestamp_seconds", ""] == 100
    metrics.config_reloaded(200.0)
    found = samples(metrics)
    assert found["usbip_device_plugin_config_reload_failed", ""] == 0
    assert found["usbip_device_plugin_config_last_reload_success_timestamp_seconds", ""] == 200
    assert found["usbip_device_plugin_config_reloads_total", "failure"] == 1
    assert found["usbip_device_plugin_config_reloads_total", "success"] == 1


def test_metrics_are_rendered_one_by_one_with_the_text_of_the_library() -> None:
    metrics = Metrics()
    metrics.devices(RESOURCE, advertised(Reason.FREE))
    metrics.step("lock", 0.02)
    count = sum(1 for _ in metrics.render())
    assert count > 10

    def comparable(text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if not line.startswith(b"process_")]

    assert comparable(result_of(metrics.render())[0]) == comparable(generate_latest(metrics.registry))

"""An engine in the process reads prompts with images as the policy does, or the run ends."""

from types import SimpleNamespace

import pytest

from trl_opsd.serving.images import forget_images, read_images


IMAGE = 9
PROMPTS = [
    {"prompt_token_ids": [1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3], "multi_modal_data": {"image": [3, 2]}},
    {"prompt_token_ids": [4, 5]},
    {"prompt_token_ids": [IMAGE, IMAGE, 6], "multi_modal_data": {"image": 2}},
]


class Engine:
    """As vLLM does, puts as many tokens as an image takes in the place of the first that there are."""

    def __init__(self, more=0):
        self.more, self.asked = more, []

    def generate(self, prompts, sampling_params):
        self.asked.append((prompts, sampling_params))
        return [SimpleNamespace(prompt_token_ids=self.read(**prompt)) for prompt in prompts]

    def read(self, prompt_token_ids, multi_modal_data=None):
        images = [] if multi_modal_data is None else multi_modal_data["image"]
        ids = []
        sizes = iter(images if isinstance(images, list) else [images])
        for token_id in prompt_token_ids:
            ids += [IMAGE] * (next(sizes, 1) + self.more) if token_id == IMAGE else [token_id]
        return ids


def test_places_are_filled_once():
    engine = Engine()
    assert [output.prompt_token_ids for output in engine.generate(PROMPTS, None)] != [
        prompt["prompt_token_ids"] for prompt in PROMPTS
    ]
    read_images(engine, IMAGE)
    outputs = engine.generate(PROMPTS, sampling_params="these")
    assert [output.prompt_token_ids for output in outputs] == [prompt["prompt_token_ids"] for prompt in PROMPTS]
    assert engine.asked[-1][1] == "these"


@pytest.mark.parametrize(("more", "image_token_id", "number"), [(1, IMAGE, 10), (0, None, 11)])
def test_another_prompt_is_refused(more, image_token_id, number):
    engine = Engine(more)
    read_images(engine, image_token_id)
    with pytest.raises(ValueError, match=f"it has {number} tokens instead of 8"):
        engine.generate(PROMPTS, sampling_params=None)
    assert engine.generate(PROMPTS[1:2], sampling_params=None)[0].prompt_token_ids == [4, 5]


class Client:
    base_url = "http://server"

    def __init__(self, status_code=200):
        self.asked = []
        self.session = SimpleNamespace(
            post=lambda url: self.asked.append(url) or SimpleNamespace(status_code=status_code)
        )

    def reset_prefix_cache(self):
        self.asked.append("prompts")

    def image_features(self, images):
        self.asked.append(images)
        return [{"features": image} for image in images]


def test_a_server_makes_images_anew():
    client = Client()
    forget_images(client)
    client.reset_prefix_cache()
    assert client.image_features(["cat"]) == [{"features": "cat"}]
    assert client.asked == ["prompts", "http://server/reset_encoder_cache", "http://server/reset_mm_cache", ["cat"]]


def test_a_server_that_keeps_images_is_refused():
    client = Client(404)
    forget_images(client)
    for call in (client.reset_prefix_cache, lambda: client.image_features(["cat"])):
        with pytest.raises(RuntimeError, match=r"it keeps images of before: .*VLLM_SERVER_DEV_MODE=1"):
            call()

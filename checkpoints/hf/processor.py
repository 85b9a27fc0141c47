"""transformers' processor of a Hugging Face folder, also where torchvision is missing.

    processor = load_processor("exported")
    inputs = processor(text=[chat], images=[image], return_tensors="pt")

``AutoProcessor`` opens no Qwen2-VL folder without torchvision, as the processor of videos needs it.
Images do not: transformers' PIL path gives the pixels that training saw.
"""

from pathlib import Path
from typing import Any

from transformers import AutoProcessor, Qwen2VLProcessor
from transformers.utils import is_torchvision_available

from triptych.errors import DataError


def load_processor(folder: Path | str) -> Any:
    """What ``AutoProcessor.from_pretrained`` gives; without torchvision, for images only.

    Raises:
        OSError: the folder has no processor, or no tokenizer.
    """
    opener = AutoProcessor if is_torchvision_available() else ImagesOnly
    return opener.from_pretrained(folder)


class ImagesOnly(Qwen2VLProcessor):
    """Qwen2-VL's processor without its part for videos: transformers reads the parts off here."""

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template)

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, **options: Any
    ) -> Any:
        """As for any processor of transformers.

        Raises:
            DataError: there is a video.
        """
        if videos is not None:
            raise DataError(
                "videos need torchvision, of the same build as torch  -> docs/install.md says which"
            )
        return super().__call__(images, text, **options)

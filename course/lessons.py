"""The table of the lessons, by number."""

from course.exercises import (
    cuda_kernels,
    double_quantization,
    lora,
    nf4,
    paged_optimizer,
    qlora_layer,
    quantization,
    training,
)

LESSONS = {
    module.LESSON.number: module.LESSON
    for module in (
        quantization,
        nf4,
        double_quantization,
        lora,
        qlora_layer,
        paged_optimizer,
        cuda_kernels,
        training,
    )
}

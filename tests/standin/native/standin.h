/* What the files of the stand-in CUDA runtime share. Functions named standin_* are also called from Python. */
#ifndef STANDIN_H
#define STANDIN_H
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "driver_types.h"

#define EXPORT __attribute__((visibility("default")))

/* One lock for all state: speed does not matter here. */
extern pthread_mutex_t standin_lock;

/* log.c: one line a call, "call|detail|stream|thread", while a log is open. */
void record(const char *call, const char *detail, const void *stream);
void record_size(const char *call, size_t bytes, const void *stream);
int is_recording(void);

/* streams.c: capture, as far as the rules of the programming guide concern one capture at a time. */
int is_capturing(cudaStream_t stream);
int is_unsafe_here(void);
cudaError_t refuse(const char *call, const char *reason, const void *stream, cudaError_t code);
/* Counts one operation of a stream: a graph node if it is captured. */
void enqueue(const char *what, cudaStream_t stream);

#endif

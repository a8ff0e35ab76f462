/* Sends HTTP requests over keep-alive connections, each waiting for its answer: a client that costs next to nothing.

   http_cost_client PORT CONNECTIONS SECONDS < REQUESTS

   REQUESTS are whole requests, each after its length in decimal and a line break. They are sent in turn. The output is
   one JSON object: answers in time, those that were not 200, the seconds, and percentiles of the latency. */

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define ANSWER 65536
#define MOST_TIMES 4000000

struct request { char *data; size_t size; };
struct connection { int fd; size_t held; double sent; char data[ANSWER + 1]; };

static struct request *requests;
static size_t request_count, turn, time_count;
static double *times;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void read_requests(void) {
    size_t size;
    while (scanf("%zu", &size) == 1) {
        getchar();
        requests = realloc(requests, (request_count + 1) * sizeof *requests);
        struct request *request = &requests[request_count++];
        request->data = malloc(size);
        request->size = size;
        if (fread(request->data, 1, size, stdin) != size) fail("requests");
    }
    if (!request_count) fail("no requests");
}

static void send_next(struct connection *c) {
    struct request *request = &requests[turn++ % request_count];
    /* Requests are short: an empty socket takes one as a whole. */
    if (send(c->fd, request->data, request->size, MSG_NOSIGNAL) != (ssize_t)request->size) fail("send");
    c->held = 0;
    c->sent = now();
}

/* The length of the answer that the buffer begins with, or 0 while its headers are not complete. */
static size_t answer_size(struct connection *c) {
    c->data[c->held] = 0;
    char *end = strstr(c->data, "\r\n\r\n");
    if (!end) return 0;
    for (char *line = strstr(c->data, "\r\n"); line && line < end; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, "content-length:", 15)) return end + 4 - c->data + strtoul(line + 17, NULL, 10);
    errno = EPROTO;
    fail("an answer without Content-Length");
    return 0;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **arguments) {
    if (count != 4) fail("http_cost_client PORT CONNECTIONS SECONDS");
    int connections = atoi(arguments[2]);
    double seconds = atof(arguments[3]);
    size_t failed = 0;
    times = malloc(MOST_TIMES * sizeof *times);
    read_requests();
    int poll = epoll_create1(0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(arguments[1]))};
    inet_pton(AF_INET, "127.0.0.1", &address.sin_addr);
    struct connection *all = calloc(connections, sizeof *all);
    double began = now();
    for (int i = 0; i < connections; i++) {
        int on = 1;
        all[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(all[i].fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
        setsockopt(all[i].fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &all[i]};
        if (epoll_ctl(poll, EPOLL_CTL_ADD, all[i].fd, &event)) fail("epoll_ctl");
        send_next(&all[i]);
    }
    double until = began + seconds;
    for (double at = now(); at < until; at = now()) {
        struct epoll_event events[64];
        int ready = epoll_wait(poll, events, 64, (int)((until - at) * 1000) + 1);
        if (ready < 0 && errno != EINTR) fail("epoll_wait");
        for (int i = 0; i < ready; i++) {
            struct connection *c = events[i].data.ptr;
            ssize_t size = recv(c->fd, c->data + c->held, ANSWER - c->held, 0);
            if (size <= 0) fail("the server closed a connection");
            c->held += size;
            size_t whole = answer_size(c);
            if (!whole || c->held < whole) continue;
            failed += strncmp(c->data, "HTTP/1.1 200", 12) != 0;
            if (time_count < MOST_TIMES) times[time_count++] = now() - c->sent;
            send_next(c);
        }
    }
    double took = now() - began;
    qsort(times, time_count, sizeof *times, ascending);
    double p50 = time_count ? times[time_count / 2] : 0, p99 = time_count ? times[time_count * 99 / 100] : 0;
    printf("{\"answers\": %zu, \"failed\": %zu, \"seconds\": %.3f, \"p50_s\": %.5f, \"p99_s\": %.5f}\n", time_count,
           failed, took, p50, p99);
    return 0;
}
